//! The list of metrics. `docs/silo-metrics.md` shows the same; a test keeps them in step.

scrape::metrics! { "silo_"
    DEVICE_SIZE Gauge "device_size_bytes" ["device"] "Size of the device";
    DEVICE_READ Histogram "device_read_seconds" ["device"] "Time that reads took at the device";
    DEVICE_WRITE Histogram "device_write_seconds" ["device"] "Time that writes took at the device";
    DEVICE_FLUSH Histogram "device_flush_seconds" ["device"] "Time that flushes took at the device";
    DEVICE_READ_BYTES Counter "device_read_bytes" ["device"] "Bytes read";
    DEVICE_WRITE_BYTES Counter "device_write_bytes" ["device"] "Bytes written";
    DEVICE_ZERO_BYTES Counter "device_zero_bytes" ["device"] "Bytes made zero without being sent";
    DEVICE_TRIM_BYTES Counter "device_trim_bytes" ["device"] "Bytes that are no longer needed";
    DEVICE_ERRORS Counter "device_errors" ["device", "operation"]
        "Operations that failed: read, write, flush, zero or trim";
    FRONT_CLIENTS Gauge "front_clients" ["device", "protocol"]
        "Clients connected: nbd-unix, nbd-tcp, vhost-user-blk, or 1 for a FUSE mount";
    CACHE_HELD Gauge "write_cache_held_bytes" ["device"] "Memory that the write cache holds";
    CACHE_WAITING Gauge "write_cache_waiting_writers" ["device"] "Writers that wait for room in it";
    CACHE_WRITTEN Counter "write_cache_written_back_bytes" ["device"]
        "Bytes that went to the device behind";
    CACHE_ERRORS Counter "write_cache_errors" ["device"]
        "Writes to the device behind that failed; each is tried again";
    FILTER_DROPPED Counter "filter_dropped_bytes" ["device"]
        "Bytes of writes that were there already";
    FILTER_FORWARDED Counter "filter_forwarded_bytes" ["device"]
        "Bytes of writes that the filter passed on";
    BACKUP_GENERATIONS Counter "backup_generations" ["line"] "Generations that were committed";
    BACKUP_FAILURES Counter "backup_failures" ["line"]
        "Rounds that failed; what they held is in the next";
    BACKUP_BYTES Counter "backup_bytes" ["line"] "Bytes of generations in the store";
    BACKUP_AGE Gauge "backup_age_seconds" ["line"]
        "Time since the last generation was committed, or since the start if none was";
    BACKUP_ENDED Gauge "backup_ended" ["line"] "1: nothing is backed up any more";
    BACKUP_NUMBER Gauge "backup_last_generation" ["line"] "Number of the last generation";
    BACKUP_LAST_BYTES Gauge "backup_last_bytes" ["line"] "Bytes that the last generation cost";
    BACKUP_LAST_REQUESTS Gauge "backup_last_requests" ["line"]
        "Requests that the last generation cost";
    BACKUP_LAST_SECONDS Gauge "backup_last_seconds" ["line"]
        "Time from the freeze to the commit of the last generation";
    BACKUP_LAST_HELD Gauge "backup_last_held_seconds" ["line"]
        "Longest time that a writer was held by the last generation";
    BACKUP_HELD Histogram "backup_held_seconds" ["line"]
        "Times that writers were held: each that copied a block first, and each freeze";
    BACKUP_TRACKED Gauge "backup_tracked_blocks" ["line"] "Blocks that are tracked for the backup";
    BACKUP_CHANGED Gauge "backup_changed_blocks" ["line"]
        "Of these, blocks that have changed and are in no generation, when last looked at";
    BACKUP_FULLEST Gauge "backup_changed_fullest_blocks" ["line"]
        "Changed blocks in the 1024 neighbours that have most of them";
    BACKUP_OLDEST Gauge "backup_oldest_change_seconds" ["line"]
        "Age of the oldest change that is in no generation; 0 if there is none";
    STORE_REQUESTS Counter "store_requests" ["line", "kind"]
        "Requests to the store: write, create, read, list, delete";
    STORE_REPEATED Counter "store_repeated_requests" ["line"]
        "Requests that repeated one that had failed";
    STORE_UPLOADED Counter "store_uploaded_bytes" ["line"] "Bytes sent to the store";
    STORE_DOWNLOADED Counter "store_downloaded_bytes" ["line"] "Bytes read from the store";
    MOVE_PHASE Gauge "move_phase" ["end"]
        "0 connecting, 1 pre-copy, 2 pausing writers, 3 switchover, 4 post-copy, 5 release";
    MOVE_SIZE Gauge "move_size_bytes" ["end"] "Size of the devices that move";
    MOVE_REMAINING Gauge "move_remaining_bytes" ["end"] "What the destination still lacks";
    MOVE_RATE Gauge "move_bytes_per_second" ["end"] "Content that moves, lately";
    MOVE_ROUNDS Counter "move_rounds" [] "Rounds that the source has closed";
    MOVE_PHASE_SECONDS Gauge "move_phase_seconds" ["end", "phase"]
        "Time in each phase so far: connect, pre-copy, pause, switch, post-copy";
    MOVE_BLACKOUT Gauge "move_blackout_seconds" ["end"]
        "Time so far in which nobody could write: pause and switch";
    MOVE_BLOCKS Counter "move_blocks" ["end", "path"]
        "Blocks by the way they went; docs/silo-metrics.md says which there are";
    MOVE_SENT Counter "move_sent_blocks" ["class"]
        "Blocks sent by why: demand, prefetch, dirty, bulk";
    MOVE_WIRE Counter "move_wire_bytes" ["end", "connection"]
        "Bytes of frames: control-sent, control-received, data, demand";
    MOVE_WAIT Histogram "move_read_wait_seconds" []
        "How long accesses at the destination waited for a block, those that waited";
    TRACKING_BLOCKS Gauge "tracking_blocks" ["device"] "Blocks that are tracked for moves";
    TRACKING_EPOCH Gauge "tracking_epoch" ["device"] "Round that is open: its clock";
    TRACKING_ABSENT Gauge "tracking_absent_blocks" ["device"]
        "Blocks of which the newest content is not here";
    TRACKING_MEMORY Gauge "tracking_memory_bytes" ["device"] "Memory that the tracking takes";
    MOUNT_SIZE Gauge "mount_size_bytes" [] "Size of the device that is mounted";
    MOUNT_HERE Gauge "mount_here_bytes" [] "Content that is here";
    MOUNT_DIRTY Gauge "mount_dirty_bytes" [] "Content that is newer here than behind";
    MOUNT_FETCHED Counter "mount_fetched_bytes" ["why"] "Bytes fetched: demand, first, ahead, bulk";
    MOUNT_WRITTEN Counter "mount_written_back_bytes" [] "Bytes that went to the device behind";
    MOUNT_FAULTS Counter "mount_faults" [] "Page faults taken";
    MOUNT_ERRORS Counter "mount_errors" [] "Requests that the device behind answered with an error";
    MOUNT_WAIT Histogram "mount_fault_wait_seconds" []
        "How long mapped accesses waited for their content, those that waited";
    MOUNT_ROUND_TRIP Gauge "mount_round_trip_seconds" [] "Smallest time that a request took";
    MOUNT_RATE Gauge "mount_bytes_per_second" [] "Best rate of late";
}
