package process_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/integration/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func shell(t *testing.T, script string, config process.Config) *process.Process {
	t.Helper()
	config.Path, config.Args = "sh", []string{"-c", script}
	p, err := process.Start(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func printed(p *process.Process, text string) func(context.Context) error {
	return func(context.Context) error {
		if !strings.Contains(p.Output(), text) {
			return fmt.Errorf("no %q yet", text)
		}
		return nil
	}
}

func TestStop(t *testing.T) {
	p := shell(t, `trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done`, process.Config{})
	if err := p.WaitReady(t.Context(), printed(p, "ready")); err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if p.Err() != nil || !strings.Contains(p.Output(), "bye") {
		t.Errorf("ended with %v and printed %q, want success and bye", p.Err(), p.Output())
	}
	if err := p.Stop(); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}

func TestOrphansAreFoundAndKilled(t *testing.T) {
	p := shell(t, `sleep 600 & echo pid $!`, process.Config{})
	if len(p.Orphans()) != 1 {
		t.Fatalf("orphans %v, want the one sleep", p.Orphans())
	}
	pid := p.Orphans()[0]
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, os.ErrNotExist) || err == nil && strings.Contains(string(data), ") Z ") || errors.Is(err, syscall.ESRCH) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d still runs: %s", pid, data)
		}
	}
}

func TestEarlyEnd(t *testing.T) {
	p := shell(t, `echo cannot open the door >&2; exit 3`, process.Config{Name: "door"})
	err := p.WaitReady(t.Context(), func(context.Context) error { return errors.New("never") })
	if !errors.Is(err, process.ErrExited) || !strings.Contains(err.Error(), "cannot open the door") || !strings.Contains(err.Error(), "door ended early (exit status 3)") {
		t.Errorf("WaitReady: %v", err)
	}
}

func TestNotReadyInTime(t *testing.T) {
	p := shell(t, `sleep 600`, process.Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := p.WaitReady(ctx, func(context.Context) error { return errors.New("door is shut") })
	if err == nil || !strings.Contains(err.Error(), "door is shut") {
		t.Errorf("WaitReady: %v", err)
	}
}

func TestLines(t *testing.T) {
	var lines []string
	p := shell(t, `printf 'one\ntw'; sleep 0.1; printf 'o\nsecret\nlast'`, process.Config{OnLine: func(line string) bool {
		lines = append(lines, line)
		return line != "secret"
	}})
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(lines, ","); got != "one,two,secret,last" {
		t.Errorf("lines %q", got)
	}
	if p.Output() != "one\ntwo\nlast\n" {
		t.Errorf("output %q", p.Output())
	}
}

func TestOutputIsBounded(t *testing.T) {
	p := shell(t, `i=0; while [ $i -lt 20000 ]; do echo "line $i of a long story that goes on and on"; i=$((i+1)); done; echo the end`, process.Config{})
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	if n := len(p.Output()); n > 600<<10 || !strings.HasSuffix(p.Output(), "the end\n") {
		t.Errorf("%d bytes are kept, ending in %q", n, p.Output()[n-20:])
	}
}

func TestMissingProgram(t *testing.T) {
	_, err := process.Start(process.Config{Path: "no-such-program", Install: "apt-get install it"})
	if !errors.Is(err, process.ErrMissing) || !strings.Contains(err.Error(), "apt-get install it") {
		t.Errorf("Start: %v", err)
	}
}

func TestFreePort(t *testing.T) {
	seen := make(map[string]bool)
	for range 50 {
		address, err := process.FreeAddress()
		if err != nil {
			t.Fatal(err)
		}
		if seen[address] {
			t.Fatalf("%s was given twice", address)
		}
		seen[address] = true
		if process.Listening(address) == nil {
			t.Errorf("someone listens on %s", address)
		}
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Errorf("the port can't be used: %v", err)
			continue
		}
		if err := process.Listening(address); err != nil {
			t.Errorf("nobody listens on %s: %v", address, err)
		}
		_ = listener.Close()
	}
}
