//! The README says what the program prints.

use assert_cmd::Command;

const README: &str = include_str!("../README.md");
const TOUR: &str = include_str!("tour");
const CONTRIBUTING: &str = include_str!("../CONTRIBUTING.md");
const RUN: &str = include_str!("run");

/// The code block behind a marker.
fn block(marker: &str) -> &'static str {
    let after = README.split_once(marker).unwrap_or_else(|| panic!("README.md has no {marker}")).1;
    after.split("```").nth(1).unwrap_or_else(|| panic!("no code block behind {marker}")).trim_matches('\n')
}

fn tenpak(arguments: &[&str]) -> String {
    let output = Command::cargo_bin("tenpak").unwrap().args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_codec_table_is_what_tenpak_codecs_prints() {
    assert_eq!(
        block("<!-- codecs -->"),
        tenpak(&["codecs"]).trim_end(),
        "copy the output of `tenpak codecs` into README.md"
    );
}

#[test]
fn the_tour_shows_the_commands_of_its_script() {
    let shown: Vec<_> = block("<!-- tour -->").lines().filter_map(|line| line.strip_prefix("$ ")).collect();
    let run: Vec<_> = TOUR.lines().filter_map(|line| line.strip_prefix("run ")).collect();
    assert_eq!(shown, run, "copy the output of `sh tests/tour` into README.md");
}

#[test]
fn the_figures_of_the_tour_are_those_that_bench_and_compress_give() {
    // Speeds differ from run to run, so only columns that cannot are compared: codec, tensors, bits, factors, loss.
    let figures = |text: &str| -> Vec<Vec<String>> {
        let row = |line: &str| line.split_whitespace().take(8).map(str::to_owned).collect::<Vec<_>>();
        text.lines().filter(|line| line.starts_with("int") || line.starts_with("nf4")).map(row).collect()
    };
    let bench = tenpak(&["bench", "tests/data/tiny-books"]);
    let shown = block("<!-- tour -->").split_once("$ tenpak bench").expect("the tour ends with bench").1;
    assert_eq!(figures(shown), figures(&bench), "copy the output of `sh tests/tour` into README.md");

    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("tiny.tenpak");
    let compress = TOUR.lines().find(|line| line.contains("compress")).unwrap();
    let codec = compress.split_whitespace().skip_while(|&word| word != "--codec").nth(1).unwrap();
    let printed = tenpak(&["compress", "tests/data/tiny-books", "-o", target.to_str().unwrap(), "--codec", codec]);
    for line in printed.lines().filter(|line| line.starts_with("int") || line.starts_with("identity")) {
        assert!(README.contains(line), "README.md lacks the line that compress prints: {line}");
    }
}

#[test]
fn the_size_that_is_asked_for_is_shown_as_it_is_printed() {
    let shown = block("<!-- any size -->");
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("any.tenpak").to_str().unwrap().to_owned();
    let command = shown.lines().next().unwrap().strip_prefix("$ tenpak ").unwrap();
    let arguments = command.split_whitespace().map(|word| if word.ends_with(".tenpak") { &*target } else { word });
    let printed = tenpak(&arguments.collect::<Vec<_>>()).replace(&target, "target/tour/any.tenpak");
    // Only the time differs from run to run.
    let figures =
        |text: &str| text.lines().filter(|line| !line.contains(" s, ")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(figures(shown)[1..], figures(printed.trim_end()), "copy what `tenpak {command}` prints into README.md");
}

#[test]
fn the_plan_is_the_one_that_is_printed() {
    let shown = block("<!-- plan -->");
    let printed = tenpak(&["plan", "tests/data/tiny-books"]);
    // Only the time differs from run to run.
    let figures = |text: &str| text.lines().filter(|line| !line.ends_with(" s")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(figures(shown)[1..], figures(printed.trim_end()), "copy what `tenpak plan` prints into README.md");
}

#[test]
fn the_directory_of_the_tour_has_the_files_that_export_writes() {
    let dir = tempfile::tempdir().unwrap();
    let [file, form] = ["tiny.tenpak", "tiny-hf"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    tenpak(&["compress", "tests/data/tiny-books", "-o", &file, "--codec", "int4_g32_fp16_v1"]);
    let printed = tenpak(&["export", &file, "--to", "hf", "-o", &form]);
    for line in printed.lines() {
        let line = line.replace(dir.path().to_str().unwrap(), "target/tour");
        assert!(README.contains(&line), "README.md lacks the line that export prints: {line}");
    }
}

#[test]
fn contributing_lists_the_commands_that_tests_run_runs() {
    let listed = CONTRIBUTING.split("```").nth(3).unwrap().trim();
    let command = |line: &'static str| line.strip_prefix("run ").or(line.strip_prefix("beside "));
    let run = RUN.lines().filter_map(command).map(|line| line.strip_prefix("env ").unwrap_or(line));
    let run: Vec<_> = run.map(|line| line.replace("pip install --quiet", "pip install")).collect();
    assert_eq!(listed.lines().collect::<Vec<_>>(), run);
}
