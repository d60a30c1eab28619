//! `muster model pull`: a model of a hub as a folder of its own.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::out_folder::refuse_model;
use muster_hub::pull::{Ask, ENDPOINT, Wanted, place, pull};
use muster_monitor::output::say;
use muster_monitor::text::short;

/// What `pull` takes.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The model's id, `OWNER/NAME`
    #[arg(value_name = "ID")]
    id: String,
    /// A branch, a tag or a commit
    #[arg(long, value_name = "R", default_value = "main")]
    revision: String,
    /// The hub's address; that of HF_ENDPOINT if it is set, else Hugging Face's
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// A new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Where files are kept and looked for first; the cache of Hugging Face's own tools by default
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Ask the hub even if the cache has the model, since a branch may have moved
    #[arg(long)]
    fresh: bool,
}

/// Pulls.
pub fn run(args: &PullArgs) -> Result<()> {
    refuse_model(&args.out)?;
    let named = args.endpoint.clone();
    // Where every other tool of the hub looks, so that a mirror is named once.
    let named = named.or_else(|| {
        std::env::var("HF_ENDPOINT")
            .ok()
            .filter(|url| !url.is_empty())
    });
    let wanted = Wanted {
        id: args.id.clone(),
        revision: args.revision.clone(),
        endpoint: named.unwrap_or_else(|| ENDPOINT.to_owned()),
        cache: args.cache.clone(),
        ask: if args.fresh {
            Ask::Always
        } else {
            Ask::IfNeeded
        },
    };
    let pulled = pull(&wanted, &mut |name, at, size| {
        eprintln!("{name}: {}B of {}B", short(at as f64), short(size as f64));
    })
    .with_context(|| format!("model {} was not pulled", args.id))?;
    place(&pulled, &args.out)?;
    say(&format!(
        "{}: {} at commit {}, {} files, {}B received",
        args.out.display(),
        args.id,
        pulled.commit,
        pulled.files.len(),
        short(pulled.received as f64)
    ))
}
