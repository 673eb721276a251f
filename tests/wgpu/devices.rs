//! Which device a name means, and what is kept of it.

use tenpak::Error;
use tenpak::gemm::Act;
use tenpak::gemm::wgpu::{self, Options, Wgpu};

use crate::expected::{by_subgroups, product};
use crate::matrices::{Owned, Stream, layouts, ordinary, random};

#[test]
fn the_software_driver_has_what_the_paths_need() {
    let adapter = by_subgroups().adapter();
    assert_eq!(Some(adapter), wgpu::adapters().get(adapter.index));
    if adapter.name.contains("llvmpipe") {
        // Else the tests of halves and subgroups would test their absence only.
        assert!(adapter.f16 && adapter.subgroups.is_some() && adapter.pipeline_cache, "{adapter:?}");
    }
}

#[test]
fn compiled_kernels_are_kept_and_a_damaged_file_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { pipelines: Some(folder.path().join("kept")), ..Options::default() };
    let owned = Owned::new(layouts()[0], 20, 64, &mut Stream(3), ordinary);
    let weights = owned.weights();
    let x = random(64, &mut Stream(4));
    let once = || {
        let device = Wgpu::with(None, options.clone()).unwrap();
        let matrix = device.upload(&weights).unwrap();
        product(&matrix, 20, &x, 1, Act::F32)
    };
    let files = || -> Vec<_> {
        let found = std::fs::read_dir(folder.path().join("kept")).into_iter().flatten();
        found.map(|entry| entry.unwrap().path()).collect()
    };
    let want = once();
    if !by_subgroups().adapter().pipeline_cache || by_subgroups().adapter().backend != "vulkan" {
        assert!(files().is_empty());
        return;
    }
    let [file] = &files()[..] else { panic!("one file, not {:?}", files()) };
    let sound = std::fs::read(file).unwrap();
    assert!(sound.len() > 32);
    assert_eq!(once(), want, "with the file");
    for damaged in [&sound[..20], &sound[..sound.len() - 1], &[], &[0; 100][..]] {
        std::fs::write(file, damaged).unwrap();
        assert_eq!(once(), want, "with a damaged file");
        assert_eq!(std::fs::read(file).unwrap().len(), sound.len(), "which is written again");
    }
}

#[test]
fn names_choose_devices_and_wrong_ones_say_what_there_is() {
    let adapter = by_subgroups().adapter();
    assert_eq!(Wgpu::named("wgpu").unwrap().adapter(), adapter);
    assert_eq!(Wgpu::named(&format!("wgpu:{}", adapter.index)).unwrap().adapter(), adapter);
    assert_eq!(tenpak::gemm::backend("wgpu").unwrap().name(), "wgpu");
    assert_eq!(tenpak::gemm::backend("cpu").unwrap().name(), "cpu");
    let said = Wgpu::named("wgpu:99").unwrap_err().to_string();
    assert!(said.contains("wgpu:99") && said.contains(&adapter.name), "{said}");
    for name in ["wgpu:", "wgpu:x", "wgpu0", "vulkan", ""] {
        assert!(matches!(tenpak::gemm::backend(name), Err(Error::Invalid(_))), "{name}");
    }
    let names: Vec<_> = tenpak::gemm::available().iter().map(|backend| backend.name()).collect();
    assert_eq!(names, ["cpu", "wgpu"]);
}
