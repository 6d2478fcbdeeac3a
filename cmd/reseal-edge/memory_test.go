package main

import (
	"math"
	"runtime/debug"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "0MiB": 0, "67108864": 64 << 20, "64MiB": 64 << 20, "1.5GiB": 3 << 29, "2097152KiB": 2 << 30, "1TiB": 1 << 40,
	} {
		if got, err := memoryLimit(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "-1", "1MB", "1 MiB x", "1MiB", "NaN", "InfGiB", "1e300", "GiB"} {
		if got, err := memoryLimit(text); err == nil {
			t.Errorf("%q: %d, no error", text, got)
		}
	}
}

func TestAutoMemoryLimit(t *testing.T) {
	limit, err := memoryLimit("auto")
	if machine := machineMemory(); err != nil || machine <= 0 || limit <= 0 || limit > machine {
		t.Errorf("auto: %d, %v; the machine has %d", limit, err, machine)
	}
	before := debug.SetMemoryLimit(5 << 30) // as GOMEMLIMIT does
	defer debug.SetMemoryLimit(before)
	if limit, _ := memoryLimit("auto"); before == math.MaxInt64 && limit != 5<<30 {
		t.Errorf("with GOMEMLIMIT: %d", limit)
	}
}
