use super::*;
use crate::identity::Identity;

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
    // A process that has ended and was not waited for is dead as well.
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

#[tokio::test]
async fn a_dropped_server_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&config(dir.path())).await;
    let pid = server.pid().unwrap();
    drop(server);
    for _ in 0..500 {
        if !is_alive(pid) {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    panic!("process {pid} lives on");
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
async fn a_server_that_cannot_store_says_so_in_its_own_words() {
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
