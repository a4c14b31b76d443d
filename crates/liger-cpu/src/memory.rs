//! How much memory there is to take.

/// Bytes that this program can still take without swapping: what the system has, and what its control group leaves it.
pub(crate) fn available() -> Option<usize> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let of_system = line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10;
    let of_group = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    Some(of_group.map_or(of_system, |(most, now)| of_system.min(most.saturating_sub(now))))
}
