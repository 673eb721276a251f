//! A store of objects on this machine: as much of S3 as is needed, which Google's answers are the same as, of Azure's blobs
//! one at a time, and of a web server; it counts what it is asked and breaks where it is told to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// What goes wrong with a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// It is answered with this status and text.
    Status(u16, &'static str),
    /// The connection ends in the middle of the answer's body.
    Cut,
    /// Right before it, the object gets other bytes of the same length.
    Replace,
    /// Half of what was sent is taken for all of it.
    Lose,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: BTreeMap<String, String>,
    /// Bytes of the answer's body.
    pub sent: usize,
}

#[derive(Default)]
struct State {
    /// By path, and of which version.
    objects: BTreeMap<String, (Vec<u8>, u64)>,
    /// Parts of uploads under way.
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    requests: Vec<Request>,
    /// Method, a part of the target, what goes wrong and how often.
    faults: Vec<(&'static str, &'static str, Fault, usize)>,
    versions: u64,
}

/// The store, gone with its process.
pub struct Store {
    pub address: String,
    state: Arc<Mutex<State>>,
}

impl Store {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), Arc::clone(&shared));
                // A connection ends when whoever asks has had enough.
                std::thread::spawn(move || drop(serve(stream, &state)));
            }
        });
        Self { address, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Puts an object at a path such as `/bucket/name`.
    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.state().put(path, bytes.into());
    }

    pub fn get(&self, path: &str) -> Option<Vec<u8>> {
        self.state().objects.get(path).map(|(bytes, _)| bytes.clone())
    }

    /// The paths of all objects that begin like this.
    pub fn paths(&self, start: &str) -> Vec<String> {
        self.state().objects.keys().filter(|path| path.starts_with(start)).cloned().collect()
    }

    /// Uploads that were begun and neither completed nor given up.
    pub fn uploads(&self) -> usize {
        self.state().uploads.len()
    }

    /// Takes the requests since the last time.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    /// Has the next `times` requests of a method go wrong whose target has `part` in it.
    pub fn fault(&self, method: &'static str, part: &'static str, fault: Fault, times: usize) {
        self.state().faults.push((method, part, fault, times));
    }
}

impl State {
    fn put(&mut self, path: &str, bytes: Vec<u8>) {
        self.versions += 1;
        self.objects.insert(path.to_owned(), (bytes, self.versions));
    }

    fn fault(&mut self, request: &Request) -> Option<Fault> {
        let fits = |(method, part, _, times): &&mut (&str, &str, Fault, usize)| {
            *method == request.method && request.target.contains(*part) && *times > 0
        };
        let (_, _, fault, times) = self.faults.iter_mut().find(fits)?;
        *times -= 1;
        Some(fault.clone())
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into() }
}

/// Answers the requests of one connection.
fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let Some((mut request, mut body)) = read(&mut reader)? else { return Ok(()) };
        let mut state = state.lock().unwrap();
        let fault = state.fault(&request);
        let path = decoded(request.target.split('?').next().unwrap());
        if fault == Some(Fault::Replace) {
            let other = vec![7; state.objects[&path].0.len()];
            state.put(&path, other);
        }
        if fault == Some(Fault::Lose) {
            body.truncate(body.len() / 2);
        }
        let answer = match fault {
            Some(Fault::Status(status, text)) => answer(status, text),
            _ => respond(&mut state, &request, &path, &body),
        };
        let is_head = request.method == "HEAD";
        let mut head = format!("HTTP/1.1 {} Whatever\r\nx-ms-version: 2023-11-03\r\n", answer.status);
        for (name, value) in &answer.headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        if !answer.headers.iter().any(|(name, _)| *name == "Content-Length") {
            write!(head, "Content-Length: {}\r\n", answer.body.len()).unwrap();
        }
        let sent = if is_head { &[][..] } else { &answer.body };
        request.sent = sent.len();
        state.requests.push(request);
        drop(state);
        out.write_all(format!("{head}\r\n").as_bytes())?;
        if fault == Some(Fault::Cut) {
            return out.write_all(&sent[..sent.len() / 2]);
        }
        out.write_all(sent)?;
    }
}

/// The next request and its body.
fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<(Request, Vec<u8>)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    assert!(!headers.contains_key("transfer-encoding"), "bodies come with their length");
    let len = headers.get("content-length").map_or(0, |len| len.parse().unwrap());
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    Ok(Some((Request { method, target, headers, sent: 0 }, body)))
}

fn respond(state: &mut State, request: &Request, path: &str, body: &[u8]) -> Answer {
    let query = request.target.split_once('?').map_or("", |(_, query)| query);
    let parameters: BTreeMap<String, String> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (key.to_owned(), decoded(value)))
        .collect();
    let parameter = |name: &str| parameters.get(name).map(String::as_str);
    let upload = parameter("uploadId");
    match &*request.method {
        "GET" if parameter("list-type").is_some() => list(state, path, parameter("prefix").unwrap_or("")),
        "GET" | "HEAD" => object(state, request, path),
        "PUT" if parameter("partNumber").is_some() => {
            let number = parameter("partNumber").unwrap().parse().unwrap();
            match state.uploads.get_mut(upload.unwrap()) {
                Some(parts) => parts.insert(number, body.to_vec()),
                None => return answer(404, "<Error><Code>NoSuchUpload</Code></Error>"),
            };
            tagged(answer(200, ""), number as u64)
        }
        "PUT" if request.headers.contains_key("if-none-match") && state.objects.contains_key(path) => {
            answer(412, "<Error><Code>PreconditionFailed</Code></Error>")
        }
        "PUT" => {
            state.put(path, body.to_vec());
            tagged(answer(if request.headers.contains_key("x-ms-version") { 201 } else { 200 }, ""), state.versions)
        }
        "POST" if parameter("uploads").is_some() => {
            state.versions += 1;
            let id = format!("upload-{}", state.versions);
            let text =
                format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
            state.uploads.insert(id, BTreeMap::new());
            answer(200, text)
        }
        "POST" if upload.is_some() => {
            let parts = state.uploads.remove(upload.unwrap()).unwrap();
            state.put(path, parts.into_values().flatten().collect());
            let tag = state.versions;
            answer(
                200,
                format!("<CompleteMultipartUploadResult><ETag>\"{tag}\"</ETag></CompleteMultipartUploadResult>"),
            )
        }
        "POST" if parameter("delete").is_some() => {
            let text = String::from_utf8(body.to_vec()).unwrap();
            let mut result = String::from("<DeleteResult>");
            for key in text.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap()) {
                state.objects.remove(&format!("{}/{key}", path.trim_end_matches('/')));
                write!(result, "<Deleted><Key>{key}</Key></Deleted>").unwrap();
            }
            answer(200, result + "</DeleteResult>")
        }
        "DELETE" if upload.is_some() => {
            state.uploads.remove(upload.unwrap());
            answer(204, "")
        }
        "DELETE" => {
            state.objects.remove(path);
            answer(204, "")
        }
        other => panic!("{other} {} is not known", request.target),
    }
}

/// An object, or a range of it, of the version that is wanted.
fn object(state: &State, request: &Request, path: &str) -> Answer {
    let Some((bytes, version)) = state.objects.get(path) else {
        return answer(404, "<Error><Code>NoSuchKey</Code></Error>");
    };
    if request.headers.get("if-match").is_some_and(|tag| *tag != format!("\"{version}\"")) {
        return answer(412, "<Error><Code>PreconditionFailed</Code></Error>");
    }
    if request.method == "HEAD" {
        let mut head = tagged(answer(200, ""), *version);
        head.headers.push(("Content-Length", bytes.len().to_string()));
        return head;
    }
    let Some(range) = request.headers.get("range").or_else(|| request.headers.get("x-ms-range")) else {
        return tagged(answer(200, bytes.clone()), *version);
    };
    let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
    let end = end.min(bytes.len() - 1);
    let mut part = tagged(answer(206, &bytes[start..=end]), *version);
    part.headers.push(("Content-Range", format!("bytes {start}-{end}/{}", bytes.len())));
    part
}

/// An answer with what tells one version from another.
fn tagged(mut answer: Answer, version: u64) -> Answer {
    answer.headers.push(("ETag", format!("\"{version}\"")));
    answer.headers.push(("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT".to_owned()));
    answer
}

/// What lies in a bucket directly behind a prefix.
fn list(state: &State, bucket: &str, prefix: &str) -> Answer {
    let start = format!("{}/{prefix}", bucket.trim_end_matches('/'));
    let mut text = String::from("<ListBucketResult>");
    let mut folders = std::collections::BTreeSet::new();
    for (path, (bytes, version)) in state.objects.iter().filter(|(path, _)| path.starts_with(&start)) {
        if let Some((folder, _)) = path[start.len()..].split_once('/') {
            folders.insert(format!("{prefix}{folder}/"));
            continue;
        }
        let key = &path[bucket.trim_end_matches('/').len() + 1..];
        let (size, time) = (bytes.len(), "2026-01-05T10:00:00.000Z");
        write!(
            text,
            "<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>{time}</LastModified><ETag>\"{version}\"</ETag></Contents>"
        )
        .unwrap();
    }
    for folder in folders {
        write!(text, "<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>").unwrap();
    }
    answer(200, text + "</ListBucketResult>")
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        rest = others;
        if *first == b'%' {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&rest[..2]).unwrap(), 16).unwrap());
            rest = &rest[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).unwrap()
}
