package main

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
)

// memoryUnits are the suffixes that --memory-limit takes.
var memoryUnits = []struct {
	suffix string
	bytes  float64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"", 1}}

// minMemoryLimit is less than a process that serves nothing needs.
const minMemoryLimit = 32 << 20

// memoryLimit reads --memory-limit: bytes, with or without a unit; "auto"; 0 is
// no limit.
func memoryLimit(text string) (int64, error) {
	if text == "auto" {
		return autoMemoryLimit(), nil
	}
	for _, unit := range memoryUnits {
		number, ok := strings.CutSuffix(text, unit.suffix)
		if !ok {
			continue
		}
		value, err := strconv.ParseFloat(number, 64)
		bytes := value * unit.bytes
		switch {
		case err != nil || !(bytes >= 0 && bytes < math.MaxInt64):
			return 0, fmt.Errorf("%q is not a size, for example 512MiB, 2GiB or auto", text)
		case bytes > 0 && bytes < minMemoryLimit:
			return 0, fmt.Errorf("%s is less than an edge needs even without clients; give at least 32MiB, or 0 for no limit", text)
		}
		return int64(bytes), nil
	}
	panic("unreachable: the last unit always fits")
}

// autoMemoryLimit is GOMEMLIMIT, or three quarters of what the process may use:
// of its control group's limit or of the machine's memory. It is 0 when none of
// these is known.
func autoMemoryLimit() int64 {
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		return limit
	}
	most := int64(math.MaxInt64)
	for _, limit := range []int64{cgroupLimit(), machineMemory()} {
		if limit > 0 {
			most = min(most, limit)
		}
	}
	if most == math.MaxInt64 {
		return 0
	}
	return most / 4 * 3
}

// cgroupLimit is the lowest memory limit of the process's control group and those
// above it, 0 if there is none.
func cgroupLimit() int64 {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	lowest := int64(0)
	for line := range strings.SplitSeq(string(groups), "\n") {
		parts := strings.SplitN(line, ":", 3)
		if len(parts) < 3 {
			continue
		}
		root, file := "/sys/fs/cgroup", "memory.max"
		if parts[1] == "memory" { // version 1
			root, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		} else if parts[0] != "0" {
			continue
		}
		for group := filepath.Clean("/" + parts[2]); ; group = filepath.Dir(group) {
			if limit := readNumber(filepath.Join(root, group, file)); limit > 0 && (lowest == 0 || limit < lowest) {
				lowest = limit
			}
			if group == "/" {
				break
			}
		}
	}
	return lowest
}

// readNumber returns 0 for a file without a number, such as one that holds "max".
func readNumber(path string) int64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	number, _ := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	return number
}

// machineMemory is the machine's memory in bytes, 0 when it is not known.
func machineMemory() int64 {
	file, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemTotal:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			return kib << 10
		}
	}
	return 0
}
