use nix::sys::signal::Signal;

use super::*;
use crate::id::RunId;
use crate::identity::Identity;
use crate::os;
use crate::subject::Role;

/// Set for the process that plays the parent: the folder to use.
const PARENT_DIR: &str = "MUSTER_TEST_PARENT_DIR";

fn config(dir: &Path) -> ServerConfig {
    let run: RunId = "r".parse().unwrap();
    let members = [Role::Dispatch, Role::Worker].map(|role| Member {
        user: Identity::generate().login_user(),
        role,
    });
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    ServerConfig {
        project,
        ..ServerConfig::new(&run, dir, members.to_vec())
    }
}

async fn start(config: &ServerConfig) -> NatsServer {
    NatsServer::start(config).await.unwrap()
}

fn is_alive(pid: u32) -> bool {
    // A zombie counts as dead.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim()
            .starts_with('Z')
    })
}

#[tokio::test]
async fn a_server_keeps_its_port_when_it_is_killed_and_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let first = start(&config).await;
    let port = first.port();
    os::signal(first.pid().unwrap(), Signal::SIGKILL).unwrap();
    assert!(!first.ended().await.is_empty());
    assert_eq!(first.pid(), None);
    let second = start(&config).await;
    assert_eq!(second.port(), port);
    second.stop().await;
}

async fn wait_until_dead(pid: u32) {
    for _ in 0..500 {
        if !is_alive(pid) {
            return;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    panic!("process {pid} is still alive");
}

#[tokio::test]
async fn a_dropped_server_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&config(dir.path())).await;
    let pid = server.pid().unwrap();
    drop(server);
    wait_until_dead(pid).await;
}

#[tokio::test]
async fn a_server_dies_with_a_parent_that_is_killed() {
    if let Some(dir) = std::env::var_os(PARENT_DIR).map(PathBuf::from) {
        let server = start(&config(&dir)).await;
        fs::write(dir.join("pid.new"), server.pid().unwrap().to_string()).unwrap();
        fs::rename(dir.join("pid.new"), dir.join("pid")).unwrap();
        return std::future::pending().await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "nats_server::tests::a_server_dies_with_a_parent_that_is_killed",
        ])
        .env(PARENT_DIR, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let server = loop {
        match fs::read_to_string(dir.path().join("pid")) {
            Ok(pid) => break pid.parse().unwrap(),
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
        assert_eq!(
            parent.try_wait().unwrap(),
            None,
            "the parent ended by itself"
        );
    };
    assert!(is_alive(server));
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_until_dead(server).await;
}

#[tokio::test]
async fn a_taken_port_is_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = ServerConfig {
        port: Some(port),
        ..config(dir.path())
    };
    let error = NatsServer::start(&config).await.unwrap_err();
    assert!(
        matches!(error, NatsServerError::PortTaken { port: named, .. } if named == port),
        "{error}"
    );
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = NatsServer::start(&config(&file.join("below")))
        .await
        .unwrap_err();
    assert!(
        matches!(error, NatsServerError::Directory { .. }),
        "{error}"
    );
    let unspeakable = config(&dir.path().join("a\"b"));
    let error = NatsServer::start(&unspeakable).await.unwrap_err();
    assert!(
        matches!(error, NatsServerError::Directory { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_member_without_a_key_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.members.push(Member {
        user: "UA\" }".to_owned(),
        role: Role::Worker,
    });
    let error = NatsServer::start(&config).await.unwrap_err();
    assert_eq!(
        error,
        NatsServerError::Member {
            user: "UA\" }".to_owned()
        }
    );
}

#[tokio::test]
async fn a_server_that_cannot_store_is_reported_with_its_own_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(STORE_DIR)).unwrap();
    // A file stands where the server keeps its streams.
    fs::write(dir.path().join(STORE_DIR).join("jetstream"), "").unwrap();
    let error = NatsServer::start(&config(dir.path())).await.unwrap_err();
    let NatsServerError::Ended { complaint, .. } = &error else {
        panic!("{error}")
    };
    assert!(complaint.to_lowercase().contains("jetstream"), "{error}");
}

#[test]
fn an_error_about_a_clients_connection_is_not_the_servers_complaint() {
    let log = "[7] 2026/11/22 18:33:52.379660 [INF] Server is ready\n\
               [7] 2026/11/22 18:34:07.385485 [ERR] JetStream failed to store a msg: no space left on device\n\
               [7] 2026/11/22 18:34:08.385485 [ERR] 127.0.0.1:4 - cid:9 - authentication error - User \"[FTL] lies\"\n";
    let complaint = last_complaint(log).unwrap();
    assert_eq!(
        complaint,
        "JetStream failed to store a msg: no space left on device"
    );
    assert!(is_disk_full(&complaint));
    assert_eq!(last_complaint("no level\n"), None);
    assert_eq!(
        first_words("nats-server: nats.conf:3:1: Parse error\n"),
        Some("nats.conf:3:1: Parse error".to_owned())
    );
}
