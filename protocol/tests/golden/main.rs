//! Golden bytes: the form of every kind of message on the wire. One file per kind under `testdata/golden/`, a line per case:
//! its name and the envelope in hexadecimal digits. A peer of an older build must read them, so another form is another
//! protocol version (`limits::PROTOCOL_VERSION`).
//!
//! A plain `cargo test` only compares. To add a case, or to write a new protocol version, give
//! `GOLDEN=rewrite cargo test --release -p muster-protocol --test golden`
//! and read the diff. A new version changes every line: each envelope holds the version and signs it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod cases;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use muster_protocol::envelope::{EnvelopeError, Kind, Statement, open, seal};
use muster_protocol::id::RunId;
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::batch::Batch;
use muster_protocol::message::control::{ControlEvent, FaultKind};
use muster_protocol::message::critique::{Admitted, CritiqueLease, Joined};
use muster_protocol::message::descriptor::Descriptor;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{FinishReason, Group, Segment};
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::ticket::Ticket;
use muster_protocol::message::verdict::{Decision, Finding, Verdict};
use muster_protocol::message::version::{Announcement, Codec, Content, Dtype, Object, Version};
use muster_protocol::subject::Role;

/// A message as its sender writes it, and a check of what a reader reads.
struct Case {
    kind: Kind,
    name: &'static str,
    bytes: Bytes,
    reads_as: Box<dyn Fn(Bytes) -> Result<(), String>>,
}

fn run() -> RunId {
    "golden".parse().unwrap()
}

fn author() -> Identity {
    Identity::from_seed(&MachineSeed::from_bytes([7; 32]))
}

/// The sequence number of every golden message: two bytes as a varint.
const SEQUENCE: u64 = 300;

fn case<T>(name: &'static str, body: T) -> Case
where
    T: Statement + Clone + PartialEq + Debug + 'static,
{
    let sealed = seal(&author(), &run(), SEQUENCE, body.clone()).unwrap();
    let reads_as = move |bytes: Bytes| match open::<T>(bytes, &run()) {
        Ok(opened) if opened.body != body => Err(format!("reads as {:?}", opened.body)),
        Ok(opened) if opened.author != author().peer_id() => Err("has another author".to_owned()),
        Ok(opened) if opened.sequence != SEQUENCE => Err("has another number".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    Case {
        kind: T::KIND,
        name,
        bytes: sealed.bytes,
        reads_as: Box::new(reads_as),
    }
}

fn all_cases() -> Vec<Case> {
    let mut all = Vec::new();
    let asks = cases::asks();
    all.extend(asks.into_iter().map(|(name, body)| case(name, body)));
    let replies = cases::replies();
    all.extend(replies.into_iter().map(|(name, body)| case(name, body)));
    let events = cases::control_events();
    all.extend(events.into_iter().map(|(name, body)| case(name, body)));
    let fates = cases::fates();
    all.extend(fates.into_iter().map(|(name, body)| case(name, body)));
    let objects = cases::objects();
    all.extend(objects.into_iter().map(|(name, body)| case(name, body)));
    let verdicts = cases::verdicts();
    all.extend(verdicts.into_iter().map(|(name, body)| case(name, body)));
    all.extend([
        case("ticket", cases::ticket()),
        case("lease", cases::lease()),
        case("two_finishes", cases::group()),
        case("commitments", cases::group_with_commitments()),
        case("audit", cases::critique_lease()),
        case("admitted", cases::admitted()),
        case("joined", cases::joined()),
        case("batch", cases::batch()),
        case("version", cases::version()),
        case("descriptor", cases::descriptor()),
        case("int8", cases::descriptor_with_int8()),
        case("peer", cases::peer()),
    ]);
    all
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden")
}

fn file_of(kind: Kind) -> PathBuf {
    let name = format!("{:02}-{kind:?}.hex", kind as u8).to_lowercase();
    folder().join(name)
}

/// The lines of a kind's file: name and digits. Empty where there is no file yet.
fn lines(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut lines = BTreeMap::new();
    for line in text.lines() {
        let (name, digits) = line
            .split_once(' ')
            .unwrap_or_else(|| panic!("{}: `{line}` is not `name digits`", path.display()));
        let earlier = lines.insert(name.to_owned(), digits.to_owned());
        assert!(earlier.is_none(), "{}: {name} stands twice", path.display());
    }
    lines
}

/// The golden digits of one message.
fn recorded(path: &Path, name: &str) -> String {
    rewrite_if_asked();
    lines(path).remove(name).unwrap_or_else(|| {
        panic!(
            "{} has no line `{name}`: run this test with GOLDEN=rewrite",
            path.display()
        )
    })
}

/// Writes every golden file anew, once, if the environment says `GOLDEN=rewrite`.
fn rewrite_if_asked() {
    static REWRITE: Once = Once::new();
    if std::env::var("GOLDEN").as_deref() != Ok("rewrite") {
        return;
    }
    REWRITE.call_once(|| {
        let mut files: BTreeMap<PathBuf, BTreeMap<&str, String>> = BTreeMap::new();
        let mut add = |path: PathBuf, name, bytes: &[u8]| {
            files
                .entry(path)
                .or_default()
                .insert(name, hex::encode(bytes));
        };
        for case in all_cases() {
            add(file_of(case.kind), case.name, &case.bytes);
        }
        let announcement = cases::announcement().encode().unwrap();
        add(announcement_file(), "announcement", &announcement);
        let compressed = case("group", cases::long_group()).bytes;
        add(compressed_file(), "group", &compressed);
        for (path, lines) in files {
            let lines = lines
                .iter()
                .map(|(name, digits)| format!("{name} {digits}\n"));
            fs::write(path, lines.collect::<String>()).unwrap();
        }
    });
}

#[test]
fn every_message_is_written_with_its_golden_bytes() {
    for case in all_cases() {
        assert_eq!(
            hex::encode(&case.bytes),
            recorded(&file_of(case.kind), case.name),
            "{:?} {}: another form of a message is another protocol version; then rewrite the golden bytes",
            case.kind,
            case.name
        );
    }
}

#[test]
fn every_golden_message_is_read_back() {
    for case in all_cases() {
        let bytes = hex::decode(recorded(&file_of(case.kind), case.name)).unwrap();
        (case.reads_as)(bytes.into())
            .unwrap_or_else(|problem| panic!("{:?} {} {problem}", case.kind, case.name));
    }
}

#[test]
fn every_golden_line_belongs_to_a_case() {
    rewrite_if_asked();
    let cases = all_cases();
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        for name in lines(&path).keys() {
            let known = cases
                .iter()
                .any(|case| case.name == name && file_of(case.kind) == path);
            let known = known || path == announcement_file() || path == compressed_file();
            assert!(known, "{}: no case is named `{name}`", path.display());
        }
    }
}

#[test]
fn every_kind_of_statement_has_golden_bytes() {
    let held: Vec<Kind> = all_cases().iter().map(|case| case.kind).collect();
    let statements = [
        Ask::KIND,
        Reply::KIND,
        Ticket::KIND,
        Lease::KIND,
        Group::KIND,
        CritiqueLease::KIND,
        Verdict::KIND,
        Joined::KIND,
        Batch::KIND,
        Version::KIND,
        FateRecord::KIND,
        ControlEvent::KIND,
        Descriptor::KIND,
        Object::KIND,
        Admitted::KIND,
        PeerRecord::KIND,
    ];
    for kind in statements {
        assert!(held.contains(&kind), "no golden message of kind {kind:?}");
    }
    assert_all_variants_of_kind(statements.len());
}

/// Holds that `Kind` has `count` variants, so that a new one is added above.
fn assert_all_variants_of_kind(count: usize) {
    let count = u8::try_from(count).unwrap();
    assert!(postcard::from_bytes::<Kind>(&[count - 1]).is_ok());
    assert!(
        postcard::from_bytes::<Kind>(&[count]).is_err(),
        "a kind has no golden message"
    );
}

/// Holds that `samples` are all variants of an enum: their numbers are 0, 1, 2, … in some order, and the next number
/// means nothing.
fn assert_all_variants<T>(samples: &[T])
where
    T: serde::Serialize + DeserializeOwned + Debug,
{
    let name = std::any::type_name::<T>();
    let mut numbers: Vec<u8> = samples
        .iter()
        .map(|sample| postcard::to_stdvec(sample).unwrap()[0])
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    let count = u8::try_from(numbers.len()).unwrap();
    let expected: Vec<u8> = (0..count).collect();
    assert_eq!(numbers, expected, "{name} has variants without a sample");
    let next = postcard::from_bytes::<T>(&[count]);
    assert!(
        matches!(next, Err(postcard::Error::SerdeDeCustom)),
        "{name} has a variant {count} without a sample: {next:?}"
    );
}

#[test]
fn every_variant_of_every_message_has_golden_bytes() {
    let asks: Vec<Ask> = cases::asks().into_iter().map(|(_, ask)| ask).collect();
    assert_all_variants(&asks);
    let replies: Vec<Reply> = cases::replies().into_iter().map(|(_, a)| a).collect();
    assert_all_variants(&replies);
    let reasons = replies.iter().filter_map(|reply| match reply {
        Reply::Wait { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_all_variants::<WaitReason>(&reasons.collect::<Vec<_>>());
    let events: Vec<ControlEvent> = cases::control_events()
        .into_iter()
        .map(|(_, e)| e)
        .collect();
    assert_all_variants(&events);
    let roles = events.iter().filter_map(|event| match event {
        ControlEvent::Started { role } => Some(*role),
        _ => None,
    });
    assert_all_variants::<Role>(&roles.collect::<Vec<_>>());
    let faults = events.iter().filter_map(|event| match event {
        ControlEvent::Fault(fault) => Some(fault.kind),
        _ => None,
    });
    assert_all_variants::<FaultKind>(&faults.collect::<Vec<_>>());
    let verdicts: Vec<Verdict> = cases::verdicts().into_iter().map(|(_, v)| v).collect();
    let decisions = verdicts.iter().map(|verdict| verdict.decision);
    assert_all_variants::<Decision>(&decisions.collect::<Vec<_>>());
    let findings = verdicts.into_iter().flat_map(|verdict| verdict.findings);
    assert_all_variants::<Finding>(&findings.collect::<Vec<_>>());
    let fates = cases::fates().into_iter().map(|(_, record)| record.fate);
    assert_all_variants::<Fate>(&fates.collect::<Vec<_>>());
    let objects: Vec<Object> = cases::objects().into_iter().map(|(_, o)| o).collect();
    let contents = objects.iter().map(|object| object.content);
    assert_all_variants::<Content>(&contents.collect::<Vec<_>>());
    let codecs = objects.iter().map(|object| object.codec);
    assert_all_variants::<Codec>(&codecs.collect::<Vec<_>>());
    let rollouts = cases::group().rollouts;
    let finishes = rollouts.iter().map(|rollout| rollout.finish);
    assert_all_variants::<FinishReason>(&finishes.collect::<Vec<_>>());
    let segments = rollouts.into_iter().flat_map(|rollout| rollout.segments);
    assert_all_variants::<Segment>(&segments.collect::<Vec<_>>());
    let descriptors = [cases::descriptor(), cases::descriptor_with_int8()];
    let classes = descriptors.into_iter().flat_map(|d| d.classes);
    assert_all_variants::<NumericClass>(&classes.collect::<Vec<_>>());
    let dtypes = cases::version().parameters.into_iter().map(|p| p.dtype);
    assert_all_variants::<Dtype>(&dtypes.collect::<Vec<_>>());
}

/// The announcement is a record of the versions log: signed parts in an unsigned wrapper, so it has no kind.
fn announcement_file() -> PathBuf {
    folder().join("announcement.hex")
}

#[test]
fn an_announcement_is_written_and_read_with_its_golden_bytes() {
    let announcement = cases::announcement();
    let recorded = recorded(&announcement_file(), "announcement");
    assert_eq!(hex::encode(announcement.encode().unwrap()), recorded);
    let bytes = hex::decode(recorded).unwrap();
    assert_eq!(Announcement::decode(&bytes), Ok(announcement));
}

/// A compressed message. Only reading is compared: another zstd may compress it to other bytes.
fn compressed_file() -> PathBuf {
    folder().join("compressed.hex")
}

#[test]
fn a_compressed_message_is_read_back() {
    let case = case("group", cases::long_group());
    let recorded = recorded(&compressed_file(), "group");
    let bytes = hex::decode(recorded).unwrap();
    let raw_bytes = postcard::to_stdvec(&cases::long_group()).unwrap().len();
    assert!(
        4 * bytes.len() < 3 * raw_bytes,
        "{} of {raw_bytes} bytes: not compressed",
        bytes.len()
    );
    (case.reads_as)(bytes.into()).unwrap();
    (case.reads_as)(case.bytes).unwrap();
}

#[test]
fn a_golden_message_of_one_kind_is_refused_as_another() {
    let ticket = seal(&author(), &run(), SEQUENCE, cases::ticket()).unwrap();
    let refused = open::<Lease>(ticket.bytes, &run()).unwrap_err();
    assert_eq!(
        refused,
        EnvelopeError::WrongKind {
            expected: Kind::Lease,
            found: Kind::Ticket as u8
        }
    );
}
