use super::*;

fn good() -> Report {
    Report {
        moves: vec![
            Move {
                from: "alpha".into(),
                to: "beta".into(),
                mode: "hybrid".into(),
                rounds: 3,
                bytes_sent: 100_663_296,
                memory_bytes: 268_435_456,
                total_ms: 1352.0,
                blackout_ms: 4.25,
                client_gap_ms: 21.0,
                faults: 1234,
                fault_p50_us: Some(118.0),
                fault_p99_us: Some(402.0),
            },
            Move {
                from: "beta".into(),
                to: "alpha".into(),
                mode: "pre-copy".into(),
                ..Move::default()
            },
        ],
        client: LoadReport { operations: 1_234_567, verified: true, ..LoadReport::default() },
        oracle: Oracle { pages_checked: 65_536, mismatches: 0, file_mismatches: 0 },
        outbound: Some(Outbound { echoed: 900, longest_gap_ms: 17.5, ..Outbound::default() }),
        further_problems: Vec::new(),
    }
}

#[test]
fn the_json_has_the_fields_that_are_promised() {
    let json = serde_json::to_value(good()).unwrap();
    let keys = |value: &serde_json::Value| {
        value.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        keys(&json["moves"][0]),
        "blackout_ms bytes_sent client_gap_ms fault_p50_us fault_p99_us faults from memory_bytes \
         mode rounds to total_ms"
    );
    for field in ["operations", "errors", "reconnects", "lost_writes"] {
        assert!(json["client"][field].is_u64(), "{field}");
    }
    assert_eq!(keys(&json["oracle"]), "file_mismatches mismatches pages_checked");
    assert_eq!(serde_json::from_value::<Report>(json).unwrap(), good());
}

#[test]
fn every_kind_of_loss_and_everything_unchecked_is_a_problem_by_name() {
    assert!(!good().lost_anything());
    type Spoil = fn(&mut Report);
    let cases: [(&str, Spoil); 15] = [
        ("did not move", |report| report.moves.clear()),
        ("no operation", |report| report.client.operations = 0),
        ("could not read", |report| report.client.verified = false),
        ("1 error", |report| report.client.errors = 1),
        ("connect again 2 times", |report| report.client.reconnects = 2),
        ("1 acknowledged write lost", |report| report.client.lost_writes = 1),
        ("applied twice", |report| report.client.doubled_writes = 1),
        ("nobody wrote", |report| report.client.wrong_answers = 1),
        ("no page", |report| report.oracle.pages_checked = 0),
        ("of memory", |report| report.oracle.mismatches = 1),
        ("of the file", |report| report.oracle.file_mismatches = 1),
        ("carried nothing", |report| report.outbound = Some(Outbound::default())),
        ("broke 1 time", |report| report.outbound.as_mut().unwrap().resets = 1),
        ("2 numbers came back", |report| report.outbound.as_mut().unwrap().wrong = 2),
        ("its disk is full", |report| report.further_problems.push("its disk is full".into())),
    ];
    for (words, spoil) in cases {
        let mut report = good();
        spoil(&mut report);
        let problems = report.problems();
        assert_eq!(problems.len(), 1, "{words}");
        assert!(problems[0].contains(words), "{problems:?}");
        assert!(report.lost_anything());
        assert!(report.render(Style::Plain).contains(&format!("FAILED: {}", problems[0])));
    }
}

#[test]
fn the_plain_table_has_no_escape_codes_and_says_what_happened() {
    let plain = good().render(Style::Plain);
    assert!(!plain.contains('\x1b'), "{plain}");
    let words =
        ["alpha → beta", "96.0 MiB", "256.0 MiB", "1.35 s", "4.2 ms", "118 / 402 µs", "1 234 567"];
    for word in words {
        assert!(plain.contains(word), "no {word} in\n{plain}");
    }
    assert!(plain.ends_with("2 moves, one connection, 1 234 567 operations: nothing was lost.\n"));
    assert!(good().render(Style::Terminal).contains('\x1b'));
}

#[test]
fn numbers_read_well() {
    assert_eq!([0, 999, 1000, 1_000_000].map(count), ["0", "999", "1 000", "1 000 000"]);
    assert_eq!([0, 1023, 1024, u64::MAX].map(bytes), ["0 B", "1023 B", "1.0 KiB", "16384.0 PiB"]);
    assert_eq!(
        [0.04, 99.94, 612.3, 1352.0].map(milliseconds),
        ["0.0 ms", "99.9 ms", "612 ms", "1.35 s"]
    );
}
