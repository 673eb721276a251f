//! The artifact format a second time, from FORMAT.md alone: it prints any content, however wrong, with correct checksums.

use tenpak::{Codec, DType, codecs};

/// A plane; what the header says of it follows from its bytes unless it is set.
#[derive(Debug, Clone, Default)]
pub struct Plane {
    pub name: String,
    /// Where it is set, `bytes` are the stream, and `blake3` is to be set too.
    pub coding: Option<String>,
    pub bytes: Vec<u8>,
    pub offset: Option<u64>,
    pub len: Option<u64>,
    pub crc32c: Option<String>,
    pub blake3: Option<String>,
}

/// A tensor.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub transposed: bool,
    pub codec: String,
    pub rate: Option<u64>,
    pub column_scales: bool,
    pub outliers: u64,
    pub planes: Vec<Plane>,
}

impl Entry {
    /// A tensor that is kept as it is.
    pub fn raw(name: &str, dtype: DType, shape: &[u64], bytes: &[u8]) -> Self {
        let plane = Plane { name: "data".to_owned(), bytes: bytes.to_vec(), ..Plane::default() };
        Self { planes: vec![plane], codec: codecs::RAW.to_owned(), ..Self::new(name, dtype, shape) }
    }

    /// An F32 tensor in a codec, or its transpose where `transposed` is set.
    pub fn encoded(name: &str, shape: &[u64], transposed: bool, codec: &'static Codec, weights: &[f32]) -> Self {
        let cols = usize::try_from(shape[usize::from(!transposed)]).unwrap();
        let encoded = codec.encode(weights, weights.len() / cols, cols).unwrap();
        let planes = encoded
            .planes()
            .map(|(plane, bytes)| Plane { name: plane.name().to_owned(), bytes: bytes.to_vec(), ..Plane::default() })
            .collect();
        Self { planes, codec: codec.id.to_owned(), transposed, ..Self::new(name, DType::F32, shape) }
    }

    /// An F32 matrix in a codec, with column scales and outliers, each a row, a column and a value.
    pub fn extra(
        name: &str,
        shape: [usize; 2],
        codec: &'static Codec,
        scales: &[f32],
        outliers: &[(usize, u16, f32)],
    ) -> Self {
        let [rows, cols] = shape;
        let shape = shape.map(|n| n as u64);
        let weights: Vec<f32> = (0..rows * cols).map(|i| (i % 29) as f32 - 14.0).collect();
        let mut entry = Self::encoded(name, &shape, false, codec, &weights);
        let mut plane = |name: &str, bytes: Vec<u8>| {
            entry.planes.push(Plane { name: name.to_owned(), bytes, ..Plane::default() });
        };
        if !scales.is_empty() {
            plane("column_scales", scales.iter().flat_map(|s| s.to_le_bytes()).collect());
        }
        if !outliers.is_empty() {
            let count = |row| u32::try_from(outliers.iter().filter(|o| o.0 == row).count()).unwrap();
            plane("outlier_counts", (0..rows).flat_map(|row| count(row).to_le_bytes()).collect());
            plane("outlier_columns", outliers.iter().flat_map(|o| o.1.to_le_bytes()).collect());
            plane("outlier_values", outliers.iter().flat_map(|o| half::f16::from_f32(o.2).to_le_bytes()).collect());
        }
        Self { column_scales: !scales.is_empty(), outliers: outliers.len() as u64, ..entry }
    }

    /// An F32 tensor of codes and one scale in `ecu_v1`, both planes coded.
    pub fn coded(name: &str, shape: [usize; 2], codes: &[u8], scale: f32) -> Self {
        let [rows, cols] = shape;
        let mut plain = Vec::new();
        for row in codes.chunks(cols) {
            plain.extend(row);
            plain.resize(plain.len().next_multiple_of(4), 0);
        }
        let scales = vec![scale; rows];
        let plane = |name: &str, coding: &str, bytes: Vec<u8>, plain: &[u8]| Plane {
            name: name.to_owned(),
            coding: Some(coding.to_owned()),
            bytes,
            blake3: Some(blake3::hash(plain).to_string()),
            ..Plane::default()
        };
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let planes = vec![
            plane("codes", "rows_v1", tenpak::coding::encode(codes, rows, cols).unwrap(), &plain),
            plane("scales", "scales_v1", tenpak::coding::encode_scales(&scales), &scale_bytes),
        ];
        let shape = shape.map(|n| n as u64);
        Self { planes, codec: "ecu_v1".to_owned(), rate: Some(4250), ..Self::new(name, DType::F32, &shape) }
    }

    fn new(name: &str, dtype: DType, shape: &[u64]) -> Self {
        Self {
            name: name.to_owned(),
            dtype: dtype.name().to_owned(),
            shape: shape.to_vec(),
            transposed: false,
            codec: String::new(),
            rate: None,
            column_scales: false,
            outliers: 0,
            planes: Vec::new(),
        }
    }
}

/// The section of a delta.
#[derive(Debug, Clone)]
pub struct Delta {
    pub base: String,
    pub result: String,
    pub runs: Vec<(i64, u64)>,
}

/// Everything a file says, before it is printed.
#[derive(Debug, Clone)]
pub struct Artifact {
    pub metadata: Vec<(String, String)>,
    pub provenance: String,
    pub delta: Option<Delta>,
    pub identity: Option<String>,
    pub tensors: Vec<Entry>,
    /// Attached files; `name` is that of the file.
    pub files: Vec<Plane>,
}

/// What is printed, byte by byte.
#[derive(Debug, Clone)]
pub struct File {
    pub magic: [u8; 8],
    pub version: u32,
    pub flags: u32,
    pub header_bytes: u64,
    pub file_bytes: Option<u64>,
    pub header_crc32c: Option<u32>,
    pub reserved: [u8; 24],
    pub preamble_crc32c: Option<u32>,
    pub body: Vec<u8>,
    pub header: Vec<u8>,
}

impl Artifact {
    pub fn new(tensors: Vec<Entry>) -> Self {
        let recipe = tenpak::recipe::Recipe::new(&codecs::all()[0]).to_toml();
        let recipe = serde_json::to_string(&recipe).unwrap();
        let provenance = format!("{{\"tool\":\"a test\",\"recipe\":{recipe},\"nonfinite\":\"error\",\"sources\":[]}}");
        Self { metadata: Vec::new(), provenance, delta: None, identity: None, tensors, files: Vec::new() }
    }

    /// The identity of tensors, as *Identity* says.
    pub fn identity_of<'a>(tensors: impl ExactSizeIterator<Item = &'a Entry>) -> String {
        let mut bytes = b"tenpak identity 1".to_vec();
        let number = |bytes: &mut Vec<u8>, n: u64| bytes.extend(n.to_le_bytes());
        let text = |bytes: &mut Vec<u8>, s: &str| {
            bytes.extend((s.len() as u64).to_le_bytes());
            bytes.extend(s.as_bytes());
        };
        number(&mut bytes, tensors.len() as u64);
        for t in tensors {
            text(&mut bytes, &t.name);
            text(&mut bytes, &t.dtype);
            number(&mut bytes, t.shape.len() as u64);
            t.shape.iter().for_each(|&d| number(&mut bytes, d));
            bytes.push(u8::from(t.transposed));
            let scaled = if t.column_scales { "+column_scales" } else { "" };
            let outliers = if t.outliers > 0 { "+outliers" } else { "" };
            text(&mut bytes, &format!("{}{scaled}{outliers}", t.codec));
            for p in &t.planes {
                let digest = blake3::Hash::from_hex(p.digest()).unwrap_or(blake3::hash(b""));
                bytes.extend(digest.as_bytes());
            }
        }
        blake3::hash(&bytes).to_string()
    }

    pub fn identity(&self) -> String {
        self.identity.clone().unwrap_or_else(|| Self::identity_of(self.tensors.iter()))
    }

    /// The planes in order, aligned, and the header.
    pub fn file(&self) -> File {
        let mut body = Vec::new();
        let mut tensors = Vec::new();
        for t in &self.tensors {
            let mut planes = Vec::new();
            for p in &t.planes {
                let offset = p.offset.unwrap_or(64 + body.len() as u64);
                body.extend(&p.bytes);
                body.resize(body.len().next_multiple_of(64), 0);
                planes.push(p.json("plane", offset));
            }
            let rate = t.rate.map_or_else(String::new, |rate| format!(",\"rate\":{rate}"));
            let scaled = if t.column_scales { ",\"column_scales\":true" } else { "" };
            let outliers = if t.outliers > 0 { format!(",\"outliers\":{}", t.outliers) } else { String::new() };
            let transposed = if t.transposed { ",\"transposed\":true" } else { "" };
            let (shape, planes) = (serde_json::to_string(&t.shape).unwrap(), planes.join(","));
            let [name, dtype, codec] = [&t.name, &t.dtype, &t.codec].map(|s| serde_json::to_string(s).unwrap());
            tensors.push(format!(
                "{{\"name\":{name},\"dtype\":{dtype},\"shape\":{shape}{transposed},\"codec\":{codec}{rate}{scaled}{outliers},\"planes\":[{planes}]}}"
            ));
        }
        let mut files = Vec::new();
        for f in &self.files {
            let offset = f.offset.unwrap_or(64 + body.len() as u64);
            body.extend(&f.bytes);
            body.resize(body.len().next_multiple_of(64), 0);
            files.push(f.json("name", offset));
        }
        let files = if files.is_empty() { String::new() } else { format!(",\"files\":[{}]", files.join(",")) };
        let pair = |(k, v): &(String, String)| {
            format!("{}:{}", serde_json::to_string(k).unwrap(), serde_json::to_string(v).unwrap())
        };
        let metadata = match &*self.metadata {
            [] => String::new(),
            all => format!("\"metadata\":{{{}}},", all.iter().map(pair).collect::<Vec<_>>().join(",")),
        };
        let delta = self.delta.as_ref().map_or_else(String::new, |d| {
            let runs = serde_json::to_string(&d.runs).unwrap();
            format!("\"delta\":{{\"base\":\"{}\",\"result\":\"{}\",\"runs\":{runs}}},", d.base, d.result)
        });
        let (provenance, identity, tensors) = (&self.provenance, self.identity(), tensors.join(","));
        let header = format!(
            "{{{metadata}\"provenance\":{provenance},{delta}\"identity\":\"{identity}\",\"tensors\":[{tensors}]{files}}}"
        );
        let coded = self.tensors.iter().flat_map(|t| &t.planes).any(|p| p.coding.is_some());
        let extra = self.tensors.iter().any(|t| t.column_scales || t.outliers > 0);
        File {
            magic: *b"\x89TNPK\r\n\x1a",
            version: 1,
            flags: u32::from(self.delta.is_some()) + 2 * u32::from(coded) + 4 * u32::from(extra),
            header_bytes: header.len() as u64,
            file_bytes: None,
            header_crc32c: None,
            reserved: [0; 24],
            preamble_crc32c: None,
            body,
            header: header.into_bytes(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.file().bytes()
    }
}

impl Plane {
    fn digest(&self) -> String {
        self.blake3.clone().unwrap_or_else(|| blake3::hash(&self.bytes).to_string())
    }

    fn json(&self, kind: &str, offset: u64) -> String {
        let crcs = || self.bytes.chunks(4 << 20).map(|c| format!("{:08x}", crc32c::crc32c(c))).collect();
        let (name, crc32c) = (serde_json::to_string(&self.name).unwrap(), self.crc32c.clone().unwrap_or_else(crcs));
        let coding = self
            .coding
            .as_ref()
            .map_or_else(String::new, |id| format!(",\"coding\":{}", serde_json::to_string(id).unwrap()));
        let (bytes, digest) = (self.len.unwrap_or(self.bytes.len() as u64), self.digest());
        format!(
            "{{\"{kind}\":{name}{coding},\"offset\":{offset},\"bytes\":{bytes},\"crc32c\":\"{crc32c}\",\"blake3\":\"{digest}\"}}"
        )
    }
}

impl File {
    /// Replaces the header, and says so in the preamble.
    pub fn header(mut self, header: impl Into<Vec<u8>>) -> Self {
        self.header = header.into();
        self.header_bytes = self.header.len() as u64;
        self
    }

    /// Replaces the first occurrence of a text in the header.
    pub fn edit(self, from: &str, to: &str) -> Self {
        let text = String::from_utf8(self.header.clone()).unwrap();
        assert!(text.contains(from), "{from} does not occur in {text}");
        self.header(text.replacen(from, to, 1))
    }

    /// Preamble, planes and header, with the checksums that they have unless one is set.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.header_bytes.to_le_bytes());
        let len = 64 + (self.body.len() + self.header.len()) as u64;
        out.extend(self.file_bytes.unwrap_or(len).to_le_bytes());
        out.extend(self.header_crc32c.unwrap_or_else(|| crc32c::crc32c(&self.header)).to_le_bytes());
        out.extend(self.reserved);
        out.extend(self.preamble_crc32c.unwrap_or_else(|| crc32c::crc32c(&out)).to_le_bytes());
        out.extend(&self.body);
        out.extend(&self.header);
        out
    }
}

#[test]
fn what_the_format_says_is_what_the_library_reads_and_writes() {
    let raw = Entry::raw("a", DType::U8, &[5], &[1, 2, 3, 4, 5]);
    let weights: Vec<f32> = [0.5, -0.25, 0.125, 1.0].repeat(6);
    let encoded = Entry::encoded("b", &[8, 3], true, codecs::get(codecs::INT8_ROW).unwrap(), &weights);
    let codes: Vec<u8> = (0..40 * 30_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    let coded = Entry::coded("c", [40, 30], &codes, 0.5);
    let extra = Entry::extra("d", [2, 3], codecs::get(codecs::INT8_ROW).unwrap(), &[1.0, 2.0, 0.5], &[(1, 0, 4.0)]);
    let mut artifact = Artifact::new(vec![raw, encoded, coded, extra]);
    artifact.metadata.push(("format".to_owned(), "pt".to_owned()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tenpak");
    std::fs::write(&path, artifact.bytes()).unwrap();
    let found = tenpak::artifact::ArtifactFile::open(&path).unwrap();
    assert_eq!(found.header().identity().to_string(), artifact.identity());
    assert_eq!(found.tensors()[1].matrix(), (3, 8));
    let plane = found.plane(2, 0).unwrap();
    assert!(plane.chunks(32).zip(codes.chunks(30)).all(|(row, codes)| row[..30] == *codes && row[30..] == [0; 2]));
    assert_eq!(found.tensors()[2].rate().unwrap().to_string(), "4.25");
    let names: Vec<_> = found.tensors()[3].planes().iter().map(|place| place.plane.name()).collect();
    let extra = ["column_scales", "outlier_counts", "outlier_columns", "outlier_values"];
    assert_eq!(names, [&["codes", "scales"], &extra[..]].concat());

    let config = Plane { name: "config.json".to_owned(), bytes: b"{}".to_vec(), ..Plane::default() };
    artifact.files.push(config);
    std::fs::write(&path, artifact.bytes()).unwrap();
    let found = tenpak::artifact::ArtifactFile::open(&path).unwrap();
    assert_eq!(*found.read_file("config.json").unwrap(), *b"{}");
    assert_eq!(found.header().identity().to_string(), artifact.identity());

    artifact.delta = Some(Delta { base: artifact.identity(), result: artifact.identity(), runs: vec![(-1, 4)] });
    std::fs::write(&path, artifact.file().edit("a test", "a program").bytes()).unwrap();
    let found = tenpak::artifact::ArtifactFile::open(&path).unwrap();
    assert_eq!(found.header().delta().unwrap().runs, [(-1, 4)]);
}
