//! What URLs promise: the same bytes as local files, by ranges, of one version; outputs whole or not at all; no secrets told.

#[path = "support/store.rs"]
mod store;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use store::{Fault, Store};
use support::{Folder, Tensor};
use tenpak::DType;

/// The sample model of the repository.
const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");

/// What nobody may be told.
const SECRET: &str = "hunter2hunter2";

/// The command line beside a store.
struct Shell {
    folder: Folder,
    store: Store,
}

impl Shell {
    fn new() -> Self {
        Self { folder: Folder::new(), store: Store::start() }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tenpak"));
        let other = |key: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|start| key.starts_with(start));
        for (key, _) in std::env::vars().filter(|(key, _)| other(key) || key.to_lowercase().ends_with("_proxy")) {
            command.env_remove(key);
        }
        let address = &*self.store.address;
        let google = serde_json::json!({
            "private_key": SECRET, "private_key_id": "", "client_email": "", "disable_oauth": true, "gcs_base_url": address,
        });
        let google = google.to_string();
        command.current_dir(self.folder.path("")).envs([
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "nobody"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
            ("GOOGLE_SERVICE_ACCOUNT_KEY", &*google),
            ("GOOGLE_ALLOW_HTTP", "true"),
            ("AZURE_STORAGE_USE_EMULATOR", "true"),
            ("AZURITE_BLOB_STORAGE_URL", address),
        ]);
        command
    }

    /// Output of a command that must end with this code: what it printed, or, where the code is 2, why not.
    fn run(&self, line: &str, code: i32) -> String {
        let output = self.command().args(line.split(' ')).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{line}\n{out}\n{err}");
        assert!(!out.contains(SECRET) && !err.contains(SECRET), "{line}: {out}{err}");
        if code == 2 { err } else { out }
    }

    /// Puts the sample model where it can be fetched, and gives the names of its files.
    fn sample(&self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(SAMPLE).unwrap() {
            let entry = entry.unwrap();
            names.push(entry.file_name().into_string().unwrap());
            self.store.put(&format!("{path}/{}", names[names.len() - 1]), fs::read(entry.path()).unwrap());
        }
        names
    }

    /// Puts a checkpoint of random weights where it can be fetched, and beside that here.
    fn checkpoint(&self, path: &str, rows: u64) -> Vec<u8> {
        let tensors: Vec<_> =
            (0..3).map(|i| Tensor::random(&format!("model.{i}.mlp.weight"), DType::F32, &[rows, 256], i)).collect();
        let bytes = fs::read(self.folder.checkpoint("model.safetensors", &tensors)).unwrap();
        self.store.put(path, bytes.clone());
        bytes
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path(name)).unwrap()
    }
}

/// The files of a directory by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(file).collect();
    files.sort();
    files
}

#[test]
fn a_file_at_a_url_becomes_the_same_artifact() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/in/model.safetensors", 64);
    shell.run("compress model.safetensors -o here.tenpak", 0);
    for (input, output, stored) in [
        ("s3://bucket/in/model.safetensors", "s3://bucket/out.tenpak", "/bucket/out.tenpak"),
        ("gs://bucket/in/model.safetensors", "gs://bucket/of/google.tenpak", "/bucket/of/google.tenpak"),
    ] {
        shell.run(&format!("compress {input} -o {output}"), 0);
        assert!(shell.store.get(stored).unwrap() == shell.bytes("here.tenpak"), "{input}");
    }
    shell.store.put("/devstoreaccount1/box/model.safetensors", shell.bytes("model.safetensors"));
    shell.run("compress az://box/model.safetensors -o az://box/out.tenpak", 0);
    assert!(shell.store.get("/devstoreaccount1/box/out.tenpak").unwrap() == shell.bytes("here.tenpak"));
    shell.run("plan s3://bucket/in/model.safetensors", 0);
    let url = format!("{}/bucket/in/model.safetensors", shell.store.address);
    shell.run(&format!("compress {url} -o there.tenpak"), 0);
    assert!(shell.bytes("there.tenpak") == shell.bytes("here.tenpak"));
    let url = format!("file://{}", shell.folder.path("model.safetensors").display());
    shell.run(&format!("compress {url} -o file://{}", shell.folder.path("file.tenpak").display()), 0);
    assert!(shell.bytes("file.tenpak") == shell.bytes("here.tenpak"));
}

#[test]
fn a_directory_at_a_url_goes_through_every_verb_like_a_local_one() {
    let shell = Shell::new();
    let names = shell.sample("/bucket/models/tiny-books");
    shell.run(&format!("compress {SAMPLE} -o here --codec int4_g32_fp16_v1"), 0);
    shell.run("compress s3://bucket/models/tiny-books -o s3://bucket/out/here --codec int4_g32_fp16_v1", 0);
    let local = files(&shell.folder.path("here"));
    assert_eq!(shell.store.paths("/bucket/out/").len(), local.len());
    for (name, bytes) in &local {
        assert!(shell.store.get(&format!("/bucket/out/here/{name}")).unwrap() == *bytes, "{name}");
    }
    // By name and slash, and over a server that lists nothing.
    let web = format!("{}/bucket", shell.store.address);
    shell.run(&format!("compress {web}/models/tiny-books -o web --codec int4_g32_fp16_v1"), 0);
    assert!(files(&shell.folder.path("web")) == local, "{names:?}");

    let url = "s3://bucket/out/here";
    shell.run(&format!("verify {url}"), 0);
    shell.run(&format!("inspect {url}/"), 0);
    shell.run(&format!("inspect {web}/out/here"), 0);
    shell.run(&format!("diff {url} here"), 0);
    shell.run("export here --to tenpak -o one.tenpak", 0);
    shell.run(&format!("export {url} --to tenpak -o s3://bucket/one.tenpak"), 0);
    assert!(shell.store.get("/bucket/one.tenpak").unwrap() == shell.bytes("one.tenpak"));
    shell.run("decompress one.tenpak -o back", 0);
    shell.run("decompress s3://bucket/one.tenpak -o s3://bucket/back", 0);
    for (name, bytes) in files(&shell.folder.path("back")) {
        assert!(shell.store.get(&format!("/bucket/back/{name}")).unwrap() == bytes, "{name}");
    }
    shell.run("decompress s3://bucket/one.tenpak -o s3://bucket/back.npz", 0);
    shell.run("decompress one.tenpak -o back.npz", 0);
    assert!(shell.store.get("/bucket/back.npz").unwrap() == shell.bytes("back.npz"));
    shell.run("compress s3://bucket/back.npz -o npz.tenpak --codec int8_sym_v1", 0);
}

#[test]
fn what_makes_a_directory_a_model_comes_last() {
    let shell = Shell::new();
    shell.sample("/bucket/tiny");
    shell.store.requests();
    shell.run("compress s3://bucket/tiny -o s3://bucket/out --max-shard-size 20000 --codec int8_sym_v1", 0);
    let put =
        shell.store.requests().into_iter().filter(|request| request.method == "PUT").map(|request| request.target);
    let put: Vec<_> = put.collect();
    let last = ["model.safetensors.index.json", "config.json", "tenpak.json"].map(|name| format!("/bucket/out/{name}"));
    assert_eq!(put[put.len() - 3..], last);
    assert!(put.len() > 5, "{put:?}");
}

#[test]
fn looking_at_a_file_fetches_little_of_it() {
    let shell = Shell::new();
    let bytes = shell.checkpoint("/bucket/model.safetensors", 4096);
    shell.run("compress model.safetensors -o s3://bucket/model.tenpak", 0);
    let all = shell.store.get("/bucket/model.tenpak").unwrap().len();
    for (line, length, most) in [
        ("inspect s3://bucket/model.tenpak", all, 4),
        ("compress s3://bucket/model.safetensors --dry-run -o x.tenpak", bytes.len(), 6),
    ] {
        shell.store.requests();
        shell.run(line, 0);
        let requests = shell.store.requests();
        let sent: usize = requests.iter().map(|request| request.sent).sum();
        assert!(sent * 8 < length, "{line}: {sent} of {length} bytes");
        assert!(requests.len() <= most, "{line}: {:?}", requests.iter().map(|r| &r.target).collect::<Vec<_>>());
        let whole = requests.iter().filter(|r| r.method == "GET" && !r.headers.contains_key("range"));
        assert_eq!(whole.count(), 0, "{line}");
    }
}

#[test]
fn every_read_asks_for_the_version_that_was_opened() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/model.safetensors", 8192);
    shell.store.requests();
    shell.run("compress s3://bucket/model.safetensors -o x.tenpak --codec int8_sym_v1", 0);
    let requests = shell.store.requests();
    let gets: Vec<_> = requests.iter().filter(|r| r.method == "GET" && r.target.contains("safetensors")).collect();
    assert!(gets.len() > 6 && gets.iter().all(|r| r.headers.contains_key("if-match")), "{}", gets.len());

    for url in ["s3://bucket".to_owned(), format!("{}/bucket", shell.store.address)] {
        shell.checkpoint("/bucket/model.safetensors", 8192);
        shell.store.fault("GET", "/bucket/model.safetensors", Fault::Status(500, "later"), 3);
        shell.store.fault("GET", "/bucket/model.safetensors", Fault::Replace, 1);
        let error = shell.run(&format!("compress {url}/model.safetensors -o y.tenpak"), 2);
        assert!(error.contains("replaced") && !shell.folder.path("y.tenpak").exists(), "{error}");
    }
}

#[test]
fn faults_that_pass_are_sat_out() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/model.safetensors", 8192);
    shell.run("compress model.safetensors -o here.tenpak --codec int8_sym_v1", 0);
    for (method, fault) in [("HEAD", Fault::Status(503, "")), ("GET", Fault::Status(500, "no")), ("GET", Fault::Cut)] {
        shell.store.fault(method, "model.safetensors", fault.clone(), 2);
        shell.run("compress s3://bucket/model.safetensors -o s3://bucket/out.tenpak --codec int8_sym_v1 --force", 0);
        assert!(shell.store.get("/bucket/out.tenpak").unwrap() == shell.bytes("here.tenpak"), "{method} {fault:?}");
    }
    shell.store.fault("PUT", "out.tenpak", Fault::Status(500, "no"), 2);
    shell.run("compress s3://bucket/model.safetensors -o s3://bucket/out.tenpak --codec int8_sym_v1 --force", 0);
    assert!(shell.store.get("/bucket/out.tenpak").unwrap() == shell.bytes("here.tenpak"));
}

#[test]
fn a_long_output_goes_up_in_parts_and_a_failed_one_leaves_nothing() {
    let shell = Shell::new();
    // More than goes up in one request.
    shell.checkpoint("/bucket/model.safetensors", 8192);
    let line = "compress model.safetensors -o s3://bucket/long.tenpak --codec raw_v1";
    shell.store.fault("PUT", "partNumber=2", Fault::Status(400, "<Error><Code>EntityTooSmall</Code></Error>"), 1);
    let error = shell.run(line, 2);
    assert!(error.contains("EntityTooSmall") && error.contains("not written"), "{error}");
    assert_eq!((shell.store.get("/bucket/long.tenpak"), shell.store.uploads()), (None, 0));

    shell.store.fault("POST", "uploadId", Fault::Status(400, "<Error><Code>InvalidPart</Code></Error>"), 1);
    shell.store.fault("DELETE", "uploadId", Fault::Status(400, "no"), 1);
    let error = shell.run(line, 2);
    assert!(error.contains("InvalidPart") && error.contains("still stored"), "{error}");
    assert_eq!((shell.store.get("/bucket/long.tenpak"), shell.store.uploads()), (None, 1));

    shell.store.requests();
    shell.run(line, 0);
    shell.run("compress model.safetensors -o here.tenpak --codec raw_v1", 0);
    assert!(shell.store.get("/bucket/long.tenpak").unwrap() == shell.bytes("here.tenpak"));
    assert_eq!(shell.store.requests().iter().filter(|r| r.target.contains("partNumber")).count(), 4);
}

#[test]
fn what_arrives_is_compared_with_what_was_sent() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/model.safetensors", 64);
    shell.store.fault("PUT", "out.tenpak", Fault::Lose, 1);
    let error = shell.run("compress model.safetensors -o s3://bucket/out.tenpak", 2);
    assert!(error.contains("bytes arrived") && error.contains("removed again"), "{error}");
    assert_eq!(shell.store.get("/bucket/out.tenpak"), None);

    shell.store.fault("HEAD", "out.tenpak", Fault::Status(400, ""), 1);
    let error = shell.run("compress model.safetensors -o s3://bucket/out.tenpak --force", 2);
    assert!(error.contains("may not be there: look"), "{error}");
    shell.run("compress model.safetensors -o here.tenpak", 0);
    assert!(shell.store.get("/bucket/out.tenpak").unwrap() == shell.bytes("here.tenpak"));
}

#[test]
fn a_directory_that_fails_half_way_is_taken_back() {
    let shell = Shell::new();
    shell.store.fault(
        "PUT",
        "/bucket/out/config.json",
        Fault::Status(403, "<Error><Code>AccessDenied</Code></Error>"),
        1,
    );
    let error = shell.run(&format!("compress {SAMPLE} -o s3://bucket/out --codec int8_sym_v1"), 2);
    assert!(error.contains("AccessDenied") && error.contains("removed again"), "{error}");
    assert_eq!(shell.store.paths("/bucket/out"), Vec::<String>::new());
    shell.run(&format!("compress {SAMPLE} -o s3://bucket/out --codec int8_sym_v1"), 0);
}

#[test]
fn what_exists_is_refused_before_any_work() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/model.safetensors", 64);
    shell.store.put("/bucket/out.tenpak", "mine");
    shell.store.put("/bucket/dir/file", "mine");
    shell.store.requests();
    let local = "compress model.safetensors -o";
    assert!(shell.run(&format!("{local} s3://bucket/out.tenpak"), 2).contains("pass --force"));
    assert!(shell.run(&format!("{local} s3://bucket/dir --force"), 2).contains("remove it"));
    let own = "compress s3://bucket/model.safetensors -o s3://bucket/model.safetensors --force";
    assert!(shell.run(own, 2).contains("destroy"));
    assert!(shell.run("decompress s3://bucket/out.tenpak -o s3://bucket/out.tenpak", 2).contains("out.tenpak"));
    assert!(shell.store.requests().iter().all(|request| ["GET", "HEAD"].contains(&&*request.method)));
    assert_eq!(shell.store.get("/bucket/out.tenpak").unwrap(), b"mine");
    shell.run(&format!("{local} s3://bucket/out.tenpak --force"), 0);
    assert_ne!(shell.store.get("/bucket/out.tenpak").unwrap(), b"mine");
}

#[test]
fn what_cannot_be_done_with_a_url_says_what_to_do() {
    let shell = Shell::new();
    shell.checkpoint("/bucket/model.safetensors", 64);
    let web = shell.store.address.clone();
    for (line, remedy) in [
        ("compress model.safetensors -o s3://bucket/x.tenpak --resume".to_owned(), "directory of this machine"),
        ("compress model.safetensors -o s3://bucket/x --shard 1/2".to_owned(), "directory of this machine"),
        ("merge-index s3://bucket/x".to_owned(), "directory of this machine"),
        ("compress s3://bucket/model.safetensors -o x.tenpak --mmap".to_owned(), "leave --mmap out"),
        (format!("compress model.safetensors -o {web}/x.tenpak"), "s3://"),
        ("inspect s3://bucket/nothing".to_owned(), "no such object"),
        ("compress s3://bucket/nothing -o x.tenpak".to_owned(), "nothing is there"),
        ("inspect ftp://bucket/nothing".to_owned(), "s3://"),
        (format!("inspect https://me:{SECRET}@host/x.tenpak"), "take them out"),
        (format!("inspect https://host/x.tenpak?sig={SECRET}"), "take it out"),
        (format!("compress model.safetensors -o az://box:{SECRET}@account/x.tenpak"), "take them out"),
    ] {
        let error = shell.run(&line, 2);
        assert!(error.contains(remedy), "{line}: {error}");
    }
    let denied = "<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><Key>hunter2hunter2</Key></Error>";
    shell.store.fault("GET", "model.safetensors", Fault::Status(403, denied), 1);
    let error = shell.run("inspect s3://bucket/model.safetensors", 2);
    assert!(error.contains("SignatureDoesNotMatch: no") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
}
