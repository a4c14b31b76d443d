//! Finding NVIDIA's libraries when the program runs: the loader's own path first, then CUDA's folders, then those that
//! Python packages bring.

use std::path::{Path, PathBuf};

/// A library and the names it goes by.
struct Wanted {
    stem: &'static str,
    /// Opened first where it lies beside the library, which needs it.
    helper: Option<&'static str>,
    /// Whether the loader finds it without help.
    found_by_loader: unsafe fn() -> bool,
}

const WANTED: [Wanted; 3] = [
    Wanted { stem: "cuda", helper: None, found_by_loader: cudarc::driver::sys::is_culib_present },
    Wanted { stem: "cublasLt", helper: None, found_by_loader: cudarc::cublaslt::sys::is_culib_present },
    Wanted { stem: "nvrtc", helper: Some("nvrtc-builtins"), found_by_loader: cudarc::nvrtc::sys::is_culib_present },
];

/// Opens the driver, cuBLASLt and NVRTC, so that later calls find them.
///
/// # Errors
/// One sentence with the libraries that are missing and where they were looked for.
pub(crate) fn open_all() -> Result<(), String> {
    open(&WANTED)
}

/// Opens NVRTC alone, which needs no GPU.
///
/// # Errors
/// As [`open_all`].
pub(crate) fn open_compiler() -> Result<(), String> {
    open(&WANTED[2..])
}

fn open(wanted: &[Wanted]) -> Result<(), String> {
    let folders = folders();
    let missing: Vec<String> =
        wanted.iter().filter(|w| !w.open(&folders)).map(|w| format!("lib{}.so", w.stem)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let looked: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    Err(format!(
        "{} not found; looked in the loader's path (LD_LIBRARY_PATH, ldconfig){}{}",
        missing.join(", "),
        if looked.is_empty() { ", and there is no CUDA folder or Python package nvidia-*" } else { ", " },
        looked.join(", ")
    ))
}

impl Wanted {
    fn open(&self, folders: &[PathBuf]) -> bool {
        // SAFETY: only asks the loader to open the library by its usual names.
        if unsafe { (self.found_by_loader)() } {
            return true;
        }
        folders.iter().any(|folder| {
            self.helper.is_none_or(|helper| open_in(folder, helper) || !has(folder, helper))
                && open_in(folder, self.stem)
        })
    }
}

fn candidates(folder: &Path, stem: &str) -> Vec<PathBuf> {
    let prefix = format!("lib{stem}.so");
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
        .collect();
    paths.sort();
    paths
}

fn has(folder: &Path, stem: &str) -> bool {
    !candidates(folder, stem).is_empty()
}

/// Opens a library by its full path and keeps it open: the loader then finds it by its short name.
fn open_in(folder: &Path, stem: &str) -> bool {
    candidates(folder, stem).iter().any(|path| {
        // SAFETY: NVIDIA's libraries run no code of ours when they are opened.
        match unsafe { libloading::Library::new(path) } {
            Ok(library) => {
                std::mem::forget(library);
                true
            }
            Err(_) => false,
        }
    })
}

/// Folders besides the loader's: `CUDA_HOME`, `CUDA_PATH`, /usr/local/cuda, and `nvidia/*/lib` of Python environments.
fn folders() -> Vec<PathBuf> {
    let roots = [std::env::var_os("CUDA_HOME"), std::env::var_os("CUDA_PATH"), Some("/usr/local/cuda".into())];
    let mut list: Vec<PathBuf> = Vec::new();
    for root in roots.into_iter().flatten().map(PathBuf::from) {
        list.extend(["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|sub| root.join(sub)));
    }
    let mut environments: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    for bin in std::env::split_paths(&path).filter(|bin| bin.join("python3").exists()) {
        environments.extend(bin.parent().map(Path::to_path_buf));
    }
    for environment in environments {
        for python in children(&environment.join("lib")).filter(|p| named(p, "python3")) {
            for packages in ["site-packages", "dist-packages"] {
                list.extend(children(&python.join(packages).join("nvidia")).map(|p| p.join("lib")));
            }
        }
    }
    list.retain(|folder| folder.is_dir());
    let mut seen = std::collections::HashSet::new();
    list.retain(|folder| seen.insert(folder.clone()));
    list
}

fn children(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let mut list: Vec<PathBuf> = folder.read_dir().into_iter().flatten().flatten().map(|e| e.path()).collect();
    list.sort();
    list.into_iter()
}

fn named(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))
}
