//! `muster model pull`: downloads a model from a hub into a folder.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::out_folder::refuse_model;
use muster_hub::pull::{CachePolicy, ENDPOINT, PullRequest, place, pull};
use muster_monitor::output::say;
use muster_monitor::text::short;

#[derive(Debug, Args)]
pub struct PullArgs {
    /// The model's id, `OWNER/NAME`
    #[arg(value_name = "ID")]
    id: String,
    /// A branch, a tag or a commit
    #[arg(long, value_name = "R", default_value = "main")]
    revision: String,
    /// Address of the hub; HF_ENDPOINT if it is set, else Hugging Face's
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of downloaded files, searched first; the cache of Hugging Face's tools by default
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Ask the hub even if the cache has the model, since a branch may have moved
    #[arg(long)]
    fresh: bool,
}

pub fn run(args: &PullArgs) -> Result<()> {
    refuse_model(&args.out)?;
    let named = args.endpoint.clone();
    // The hub's other tools read this variable too, so that a user names a mirror once.
    let named = named.or_else(|| {
        std::env::var("HF_ENDPOINT")
            .ok()
            .filter(|url| !url.is_empty())
    });
    let request = PullRequest {
        id: args.id.clone(),
        revision: args.revision.clone(),
        endpoint: named.unwrap_or_else(|| ENDPOINT.to_owned()),
        cache: args.cache.clone(),
        cache_policy: if args.fresh {
            CachePolicy::Revalidate
        } else {
            CachePolicy::Trust
        },
    };
    let pulled = pull(&request, &mut |name, at, size| {
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
