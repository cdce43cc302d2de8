use super::*;

fn full() -> MachineConfig {
    let mut config = MachineConfig::new(vec!["redis-server".into(), "/etc/redis.conf".into()]);
    config.env.insert("LANG".into(), "C.UTF-8".into());
    config.working_dir = "/var/lib/redis".into();
    config.user = "redis:redis".into();
    config.restart.policy = RestartPolicy::Always;
    config.at_end = AtEnd::Stay;
    config.hooks.before_suspend =
        Some(Hook { argv: vec!["/bin/sync".into()], timeout: Duration::from_millis(250) });
    config.probes.readiness = Some(Probe {
        check: Check::Tcp { port: 6379 },
        interval: Duration::from_millis(200),
        timeout: Duration::from_secs(1),
    });
    config.probes.liveness = Some(Probe {
        check: Check::Exec { argv: vec!["redis-cli".into(), "ping".into()] },
        interval: Duration::from_secs(5),
        timeout: Duration::from_secs(2),
    });
    config
}

const GOLDEN: &str = r#"{
  "version": "1.0",
  "argv": [
    "redis-server",
    "/etc/redis.conf"
  ],
  "env": {
    "LANG": "C.UTF-8"
  },
  "working_dir": "/var/lib/redis",
  "user": "redis:redis",
  "restart": {
    "policy": "always",
    "backoff_first_ms": 500,
    "backoff_max_ms": 30000,
    "backoff_reset_ms": 60000
  },
  "at_end": "stay",
  "stop_timeout_ms": 10000,
  "hooks": {
    "before_suspend": {
      "argv": [
        "/bin/sync"
      ],
      "timeout_ms": 250
    }
  },
  "probes": {
    "liveness": {
      "exec": {
        "argv": [
          "redis-cli",
          "ping"
        ]
      },
      "interval_ms": 5000,
      "timeout_ms": 2000
    },
    "readiness": {
      "tcp": {
        "port": 6379
      },
      "interval_ms": 200,
      "timeout_ms": 1000
    }
  }
}
"#;

#[test]
fn the_file_reads_and_writes_as_the_golden_text() {
    assert_eq!(full().to_json().unwrap(), GOLDEN);
    assert_eq!(MachineConfig::from_json(GOLDEN.as_bytes()).unwrap(), full());
}

#[test]
fn the_shortest_file_means_root_restart_on_failure_and_power_off_at_the_end() {
    let config = MachineConfig::from_json(br#"{"version":"1.0","argv":["/bin/true"]}"#).unwrap();
    assert_eq!(config, MachineConfig::new(vec!["/bin/true".into()]));
    assert_eq!(config.restart.policy, RestartPolicy::OnFailure);
    assert_eq!(config.at_end, AtEnd::PowerOff);
}

#[test]
fn another_major_version_is_refused_by_name_even_when_its_fields_are_unknown() {
    let error = MachineConfig::from_json(br#"{"version":"2.0","programs":[]}"#).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("version 2.0") && text.contains("understands 1.x"), "{text}");
}

#[test]
fn a_newer_minor_version_is_read_and_its_additions_are_ignored() {
    let config =
        MachineConfig::from_json(br#"{"version":"1.9","argv":["a"],"colour":"green"}"#).unwrap();
    assert_eq!(config.argv, ["a"]);
}

#[test]
fn a_file_without_a_version_is_refused() {
    let error = MachineConfig::from_json(br#"{"argv":["a"]}"#).unwrap_err();
    assert!(error.to_string().contains("version"), "{error}");
    let error = MachineConfig::from_json(br#"{"version":"one","argv":["a"]}"#).unwrap_err();
    assert!(error.to_string().contains("MAJOR.MINOR"), "{error}");
}

/// A change that breaks a rule, and the field that the error must name.
type Break = (fn(&mut MachineConfig), &'static str);

#[test]
fn every_broken_rule_is_named_by_its_field() {
    let breaks: &[Break] = &[
        (|c| c.argv = vec![String::new()], "argv"),
        (|c| c.argv.push("a\0b".into()), "argv"),
        (|c| drop(c.env.insert("A=B".into(), String::new())), "env"),
        (|c| c.working_dir = "var".into(), "working_dir"),
        (|c| c.user = "a\nb".into(), "user"),
        (|c| c.restart.backoff_first = Duration::ZERO, "restart.backoff_first_ms"),
        (|c| c.restart.backoff_max = Duration::from_millis(1), "restart.backoff_max_ms"),
        (
            |c| c.hooks.after_resume = Some(Hook { argv: vec![], timeout: hook_timeout() }),
            "hooks.after_resume.argv",
        ),
        (
            |c| c.hooks.before_suspend.as_mut().unwrap().timeout = Duration::ZERO,
            "hooks.before_suspend.timeout_ms",
        ),
        (
            |c| c.probes.readiness.as_mut().unwrap().check = Check::Tcp { port: 0 },
            "probes.readiness.tcp.port",
        ),
        (
            |c| c.probes.liveness.as_mut().unwrap().interval = Duration::ZERO,
            "probes.liveness.interval_ms",
        ),
    ];
    for (break_it, name) in breaks {
        let mut config = full();
        break_it(&mut config);
        let text = config.check().unwrap_err().to_string();
        assert!(text.contains(&format!("config's {name} ")), "{name}: {text}");
        assert!(config.to_json().is_err(), "{name} was written");
    }
}
