//! The folder that a run leaves behind.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use lora_core::{AdapterInfo, VisitLora, save_adapter};
use serde::Serialize;

use crate::curve::draw_loss_curve;
use crate::error::{Error, ErrorKind, Result};
use crate::train::StepReport;

/// A run's folder while it is being filled.
///
/// Everything is written into a hidden sibling folder, which [`finish`](Self::finish) renames: the
/// folder is complete or absent. A run that fails takes its sibling with it; one that is killed leaves
/// it, with the metrics so far, under a name that begins with a dot and ends in `.tmp`.
///
/// | file | holds |
/// |---|---|
/// | `settings.toml` | every setting of the run |
/// | `metrics.jsonl` | a line for each step |
/// | `loss.png` | the loss curve |
/// | `adapter/` | the adapter, in PEFT's format |
#[derive(Debug)]
pub struct RunFolder {
    folder: PathBuf,
    sibling: PathBuf,
    complete: bool,
    metrics: File,
    training: Vec<(usize, f64)>,
    held_out: Vec<(usize, f64)>,
}

const SETTINGS_FILE: &str = "settings.toml";

impl RunFolder {
    /// Starts a run's folder with the text of its settings.
    ///
    /// # Errors
    /// When the folder exists and is not empty, or cannot be made.
    pub fn create(folder: impl AsRef<Path>, settings: &str) -> Result<Self> {
        let folder: PathBuf = folder.as_ref().components().collect(); // "run/./" is "run"
        Self::check_free(&folder)?;
        // Reserved now: a place that cannot be written must not come to light after hours of work.
        fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, source))?;
        let folder = folder.canonicalize().map_err(|source| Error::io(&folder, source))?;
        let name = folder
            .file_name()
            .ok_or_else(|| Error::settings("output", "the name of a folder", folder.display()))?;
        let sibling = folder.with_file_name(format!(
            ".{}.{}.tmp",
            name.to_string_lossy(),
            std::process::id()
        ));
        let io = |path: &Path, source| Error::io(path, source);
        fs::create_dir_all(&sibling).map_err(|source| io(&sibling, source))?;
        let settings_path = sibling.join(SETTINGS_FILE);
        fs::write(&settings_path, settings).map_err(|source| io(&settings_path, source))?;
        let metrics_path = sibling.join("metrics.jsonl");
        let metrics = File::create(&metrics_path).map_err(|source| io(&metrics_path, source))?;
        Ok(Self {
            folder,
            sibling,
            complete: false,
            metrics,
            training: Vec::new(),
            held_out: Vec::new(),
        })
    }

    /// Checks that a run may be written to `folder`, before hours of work rely on it.
    ///
    /// # Errors
    /// When it holds a run, or other files, or is no folder.
    pub fn check_free(folder: &Path) -> Result<()> {
        if folder.join(SETTINGS_FILE).exists() {
            return Err(ErrorKind::RunExists { path: folder.to_owned() }.into());
        }
        let mut entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::io(folder, source)),
        };
        if entries.next().is_some() {
            let found = format!("{}, which holds other files", folder.display());
            return Err(Error::settings("output", "a new or an empty folder", found));
        }
        Ok(())
    }

    /// Notes the held-out loss before the first step, and which rows of the data it was measured on,
    /// counted from 0.
    ///
    /// # Errors
    /// When the metrics cannot be written.
    pub fn start(&mut self, held_out_loss: f64, held_out_rows: &[usize]) -> Result<()> {
        self.held_out.push((0, held_out_loss));
        self.write_line(&serde_json::json!({
            "step": 0,
            "held_out_loss": held_out_loss,
            "held_out_rows": held_out_rows,
        }))
    }

    /// Notes a step.
    ///
    /// # Errors
    /// When the metrics cannot be written.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        self.training.push((report.step, report.loss));
        self.held_out.extend(report.held_out_loss.map(|loss| (report.step, loss)));
        self.write_line(report)
    }

    fn write_line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value).expect("numbers are always JSON");
        line.push('\n');
        let written = self.metrics.write_all(line.as_bytes());
        written.map_err(|source| Error::io(self.sibling.join("metrics.jsonl"), source))
    }

    /// Writes the adapter and the loss curve, and gives the folder its name.
    ///
    /// # Errors
    /// When anything cannot be written. A complete run that only could not be given its name is kept
    /// under its sibling's, which the message says.
    pub fn finish<M: VisitLora>(
        mut self,
        model: &M,
        info: &AdapterInfo,
        title: &str,
    ) -> Result<PathBuf> {
        save_adapter(model, self.sibling.join("adapter"), info)?;
        self.metrics.sync_all().map_err(|source| Error::io(&self.sibling, source))?;
        draw_loss_curve(&self.sibling.join("loss.png"), title, &self.training, &self.held_out)?;
        self.complete = true;
        // Not every system renames onto an empty folder.
        fs::remove_dir(&self.folder)
            .and_then(|()| fs::rename(&self.sibling, &self.folder))
            .map_err(|source| ErrorKind::NotRenamed {
                path: self.folder.clone(),
                kept: self.sibling.clone(),
                source,
            })?;
        Ok(self.folder.clone())
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // A run that is not complete has failed, and its error is on the way to the user already.
        if !self.complete {
            let _ = fs::remove_dir_all(&self.sibling);
            let _ = fs::remove_dir(&self.folder); // only if it is empty
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_run_that_is_dropped_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let mut run = RunFolder::create(temp.path().join("a/./"), "").unwrap();
        run.start(1.0, &[2]).unwrap();
        assert_eq!(entries(temp.path()).len(), 2, "the reserved folder and its sibling");
        drop(run);
        assert!(entries(temp.path()).is_empty());
    }

    #[test]
    fn a_folder_that_is_taken_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(RunFolder::create(&file, "").is_err());
        assert!(RunFolder::create(temp.path(), "").is_err());
        fs::write(temp.path().join(SETTINGS_FILE), "").unwrap();
        let error = RunFolder::create(temp.path(), "").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::RunExists { .. }), "{error}");
        assert_eq!(entries(temp.path()), ["file", SETTINGS_FILE]);
    }

    #[test]
    fn a_complete_run_that_cannot_be_renamed_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        let device = burn::tensor::Device::flex();
        let layer = burn::nn::LinearConfig::new(4, 4).init(&device);
        let model: lora_core::AdaptableLinear =
            lora_core::LoraLinear::wrap(layer, 2, 4.0).unwrap().into();
        let folder = temp.path().join("run");
        let run = RunFolder::create(&folder, "rank = 2").unwrap();
        // Another program has used the folder in the meantime.
        fs::write(folder.join("other"), "").unwrap();
        let error = run.finish(&model, &AdapterInfo::default(), "title").unwrap_err();
        let ErrorKind::NotRenamed { kept, .. } = error.kind() else { panic!("{error}") };
        assert_eq!(entries(kept), ["adapter", "loss.png", "metrics.jsonl", SETTINGS_FILE]);
    }
}
