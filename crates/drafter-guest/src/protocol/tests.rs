use super::*;
use crate::protocol::MAX_OUTPUT;
use proptest::prelude::*;

fn host_golden() -> Vec<(HostMessage, &'static str)> {
    let mut exec = ExecRequest::new(vec!["sh".into(), "-c".into()], Duration::from_millis(1500));
    let plain = exec.clone();
    exec.env.insert("A".into(), "1".into());
    exec.working_dir = Some("/tmp".into());
    exec.user = Some("redis".into());
    vec![
        (
            HostMessage::Hello { version: 1, nonce: u64::MAX },
            r#"{"type":"hello","version":1,"nonce":18446744073709551615}"#,
        ),
        (HostMessage::Ping { id: 1 }, r#"{"type":"ping","id":1}"#),
        (HostMessage::Status { id: 2 }, r#"{"type":"status","id":2}"#),
        (
            HostMessage::BeforeSuspend { id: 3, sync: true },
            r#"{"type":"before_suspend","id":3,"sync":true}"#,
        ),
        (
            HostMessage::AfterResume {
                id: 4,
                wall_clock_ns: 1_700_000_000_000_000_001,
                entropy: (0..32).collect(),
                host_name: Some("fork-2".into()),
            },
            r#"{"type":"after_resume","id":4,"wall_clock_ns":1700000000000000001,"entropy":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","host_name":"fork-2"}"#,
        ),
        (
            HostMessage::Become {
                id: 3,
                wall_clock_ns: 5,
                entropy: (0..32).collect(),
                identity: NewIdentity {
                    host_name: "redis-1".into(),
                    copy_of: "redis".into(),
                    address: Some(Ipv4Addr::new(10, 90, 0, 6)),
                    address_v6: None,
                    instance: "00ff".into(),
                },
            },
            r#"{"type":"become","id":3,"wall_clock_ns":5,"entropy":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","host_name":"redis-1","copy_of":"redis","address":"10.90.0.6","instance":"00ff"}"#,
        ),
        (
            HostMessage::Probe { id: 5, kind: ProbeKind::Readiness },
            r#"{"type":"probe","id":5,"kind":"readiness"}"#,
        ),
        (
            HostMessage::Exec { id: 6, exec: plain },
            r#"{"type":"exec","id":6,"argv":["sh","-c"],"timeout_ms":1500}"#,
        ),
        (
            HostMessage::Exec { id: 7, exec },
            r#"{"type":"exec","id":7,"argv":["sh","-c"],"env":{"A":"1"},"working_dir":"/tmp","user":"redis","timeout_ms":1500}"#,
        ),
        (HostMessage::Cancel { id: 8, exec: 7 }, r#"{"type":"cancel","id":8,"exec":7}"#),
        (HostMessage::Shutdown { id: 9 }, r#"{"type":"shutdown","id":9}"#),
    ]
}

fn guest_golden() -> Vec<(GuestMessage, &'static str)> {
    let failure = Failure { code: FailureCode::Hook, message: "it \"failed\"\n".into() };
    let entry = Entry {
        state: EntryState::Running { pid: 71 },
        restarts: 2,
        last_end: Some("ended with status 1".into()),
    };
    vec![
        (GuestMessage::Started {}, r#"{"type":"started"}"#),
        (
            GuestMessage::Hello { version: 1, nonce: 5, agent: "0.1.0".into() },
            r#"{"type":"hello","version":1,"nonce":5,"agent":"0.1.0"}"#,
        ),
        (GuestMessage::Done { id: 1 }, r#"{"type":"done","id":1}"#),
        (
            GuestMessage::Failed { id: 2, failure },
            r#"{"type":"failed","id":2,"code":"hook","message":"it \"failed\"\n"}"#,
        ),
        (
            GuestMessage::Status { id: 3, entry, uptime_ms: 12 },
            r#"{"type":"status","id":3,"entry":{"state":"running","pid":71,"restarts":2,"last_end":"ended with status 1"},"uptime_ms":12}"#,
        ),
        (
            GuestMessage::Resumed { id: 4, clock_step_ns: -5 },
            r#"{"type":"resumed","id":4,"clock_step_ns":-5}"#,
        ),
        (
            GuestMessage::Probed { id: 5, ok: false, detail: "refused".into(), interval_ms: 200 },
            r#"{"type":"probed","id":5,"ok":false,"detail":"refused","interval_ms":200}"#,
        ),
        (
            GuestMessage::Output { id: 6, stream: Stream::Stderr, data: vec![0, 255, 10] },
            r#"{"type":"output","id":6,"stream":"stderr","data":"AP8K"}"#,
        ),
        (
            GuestMessage::Exited { id: 6, status: ExitStatus::Code(3) },
            r#"{"type":"exited","id":6,"status":{"code":3}}"#,
        ),
        (
            GuestMessage::Exited { id: 7, status: ExitStatus::TimedOut },
            r#"{"type":"exited","id":7,"status":"timed_out"}"#,
        ),
    ]
}

#[test]
fn host_messages_are_the_golden_lines() {
    let mut types = Vec::new();
    for (message, text) in host_golden() {
        assert_eq!(String::from_utf8(message.encode().unwrap()).unwrap(), format!("{text}\n"));
        let decoded = HostMessage::decode(text.as_bytes()).unwrap();
        assert_eq!(decoded, Decoded::Known(message));
        types.push(serde_json::from_str::<serde_json::Value>(text).unwrap()["type"].clone());
    }
    types.dedup();
    assert_eq!(types, HOST_TYPES, "every known type has its golden line");
}

#[test]
fn guest_messages_are_the_golden_lines() {
    let mut types = Vec::new();
    for (message, text) in guest_golden() {
        assert_eq!(String::from_utf8(message.encode().unwrap()).unwrap(), format!("{text}\n"));
        let decoded = GuestMessage::decode(text.as_bytes()).unwrap();
        assert_eq!(decoded, Decoded::Known(message));
        types.push(serde_json::from_str::<serde_json::Value>(text).unwrap()["type"].clone());
    }
    types.dedup();
    assert_eq!(types, GUEST_TYPES, "every known type has its golden line");
}

#[test]
fn an_unknown_message_is_kept_by_name_and_id() {
    let decoded = HostMessage::decode(br#"{"type":"hibernate","id":7,"deep":true}"#).unwrap();
    assert_eq!(decoded, Decoded::Unknown { name: "hibernate".into(), id: Some(7) });
    let decoded = GuestMessage::decode(br#"{"type":"weather"}"#).unwrap();
    assert_eq!(decoded, Decoded::Unknown { name: "weather".into(), id: None });
}

#[test]
fn unknown_fields_and_unknown_failure_codes_are_taken() {
    let line = br#"{"type":"failed","id":1,"code":"moonphase","message":"m","hint":"wait"}"#;
    let Decoded::Known(GuestMessage::Failed { failure, .. }) = GuestMessage::decode(line).unwrap()
    else {
        panic!("not a failure")
    };
    assert_eq!(failure.code, FailureCode::Other);
}

#[test]
fn a_known_message_without_its_content_is_refused() {
    for line in [
        r#"{"type":"ping"}"#,
        r#"{"type":"exec","id":1}"#,
        r#"{"type":"become","id":3,"wall_clock_ns":5,"entropy":"AAEC","host_name":"a","copy_of":"b","instance":"c"}"#,
        r#"{"type":"become","id":3,"wall_clock_ns":5,"entropy":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","host_name":"a\nb","copy_of":"b","instance":"c"}"#,
        r#"{"type":"after_resume","id":1,"wall_clock_ns":1,"entropy":"not base64!"}"#,
        r#"{"type":"after_resume","id":1,"wall_clock_ns":1,"entropy":"AAEC"}"#,
        r#"{"id":1}"#,
        "[]",
        "hello",
        "",
    ] {
        assert!(HostMessage::decode(line.as_bytes()).is_err(), "{line}");
    }
}

#[test]
fn the_largest_output_fits_and_a_command_beyond_a_line_is_refused() {
    let largest =
        GuestMessage::Output { id: u64::MAX, stream: Stream::Stdout, data: vec![7; MAX_OUTPUT] };
    assert!(largest.encode().unwrap().len() <= MAX_LINE);
    let exec = ExecRequest::new(vec!["x".repeat(MAX_LINE)], Duration::from_secs(1));
    let error = HostMessage::Exec { id: 1, exec }.encode().unwrap_err();
    assert!(error.to_string().contains("send less"), "{error}");
}

#[test]
fn only_output_leaves_a_request_open() {
    for (message, _) in guest_golden() {
        let no_answer = matches!(message, GuestMessage::Started {} | GuestMessage::Hello { .. });
        let open = no_answer || matches!(message, GuestMessage::Output { .. });
        assert_eq!(message.is_final(), !open, "{message:?}");
        assert_eq!(message.id().is_none(), no_answer);
    }
}

proptest! {
    #[test]
    fn no_line_makes_a_decoder_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        drop(HostMessage::decode(&line));
        drop(GuestMessage::decode(&line));
    }

    #[test]
    fn output_of_any_bytes_comes_back(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        let message = GuestMessage::Output { id: 1, stream: Stream::Stdout, data };
        let line = message.encode().unwrap();
        prop_assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        let decoded = GuestMessage::decode(&line[..line.len() - 1]).unwrap();
        prop_assert_eq!(decoded, Decoded::Known(message));
    }
}
