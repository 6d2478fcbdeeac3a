package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 20 * time.Second

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// disk is an output that takes left bytes (below 0: any number) and then fails
// within a write, as a full file system does.
type disk struct {
	mu      sync.Mutex
	left    int
	data    bytes.Buffer
	blocked chan struct{} // Write waits for it, if not nil
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	blocked := d.blocked
	d.mu.Unlock()
	if blocked != nil {
		<-blocked
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left < 0 || len(p) <= d.left {
		if d.left > 0 {
			d.left -= len(p)
		}
		return d.data.Write(p)
	}
	n, _ := d.data.Write(p[:d.left])
	d.left = 0
	return n, syscall.ENOSPC
}

func (d *disk) space(bytes int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left = bytes
}

func (d *disk) lines() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Split(strings.TrimSuffix(d.data.String(), "\n"), "\n")
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.b.String(), text)
}

func newAccessLog(t *testing.T, path string, stdout io.Writer) (*accessLog, *lockedBuffer) {
	t.Helper()
	var says lockedBuffer
	access, err := openAccessLog(path, stdout, slog.New(slog.NewTextHandler(&says, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return access, &says
}

// records are the numbers of the records among lines, in order, and how many
// lines are not.
func records(t *testing.T, lines []string) (numbers []int, broken int) {
	t.Helper()
	for _, line := range lines {
		var record struct{ N *int }
		if json.Unmarshal([]byte(line), &record) != nil || record.N == nil {
			broken++
			continue
		}
		numbers = append(numbers, *record.N)
	}
	return numbers, broken
}

func inOrder(numbers []int, n int) bool {
	for i, number := range numbers {
		if i != number {
			return false
		}
	}
	return len(numbers) == n
}

func TestAccessLogIsWrittenAtTheEnd(t *testing.T) {
	out := &disk{left: -1}
	access, _ := newAccessLog(t, "-", out)
	for i := range 20000 {
		slog.New(slog.NewJSONHandler(access.records(), nil)).Info("request", "n", i)
	}
	access.Close()
	if numbers, broken := records(t, out.lines()); !inOrder(numbers, 20000) || broken != 0 {
		t.Errorf("%d records, want 20000; %d broken lines", len(numbers), broken)
	}
}

func TestNoAccessLog(t *testing.T) {
	access, err := openAccessLog("", nil, nil)
	if err != nil || access.records() != nil {
		t.Fatal(access, err)
	}
	access.Reopen()
	access.Close()
	if access.Dropped() != 0 {
		t.Error("dropped")
	}
}

// TestAccessLogSurvivesAFullDisk fills the disk in the middle of a record, and
// again when there is space for a little.
func TestAccessLogSurvivesAFullDisk(t *testing.T) {
	out := &disk{left: 1000}
	access, says := newAccessLog(t, "-", out)
	log := slog.New(slog.NewJSONHandler(access.records(), nil))
	for i := range 100 {
		log.Info("request", "n", i)
	}
	eventually(t, "it says so", func() bool { return says.count("can't be written") == 1 })
	out.space(500)
	for i := range 100 {
		log.Info("request", "n", 100+i)
	}
	eventually(t, "a little more is written", func() bool { return len(strings.Join(out.lines(), "\n")) >= 1499 })
	out.space(-1)
	eventually(t, "all is written", func() bool { numbers, _ := records(t, out.lines()); return len(numbers) == 200 })
	access.Close()
	numbers, broken := records(t, out.lines())
	if !inOrder(numbers, 200) || broken > 2 {
		t.Errorf("records %v, %d broken lines", numbers, broken)
	}
	if access.Dropped() != 0 {
		t.Errorf("%d dropped, although all fit into memory", access.Dropped())
	}
	if once, again := says.count("can't be written"), says.count("being written again"); once != 1 || again != 1 {
		t.Errorf("said %d times that it can't be written and %d times that it can", once, again)
	}
}

// TestAccessLogNeverBlocks has an output that takes nothing, as a pipe whose
// reader hangs.
func TestAccessLogNeverBlocks(t *testing.T) {
	release := make(chan struct{})
	out := &disk{left: -1, blocked: release}
	access, _ := newAccessLog(t, "-", out)
	log, text := slog.New(slog.NewJSONHandler(access.records(), nil)), strings.Repeat("x", 1000)
	const n = 3 * accessPending / 1000
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range n {
			log.Info("request", "n", i, "text", text)
		}
	}()
	select {
	case <-written:
	case <-time.After(patience):
		t.Fatal("records wait for the output")
	}
	dropped := access.Dropped()
	if dropped == 0 {
		t.Error("nothing was dropped")
	}
	close(release)
	access.Close()
	if numbers, broken := records(t, out.lines()); len(numbers)+int(dropped) != n || broken != 0 {
		t.Errorf("%d written and %d dropped of %d; %d broken lines", len(numbers), dropped, n, broken)
	}
}

func TestAccessLogIsOpenedAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	// As a crash leaves it.
	if err := os.WriteFile(path, []byte(`{"n":`), 0o600); err != nil {
		t.Fatal(err)
	}
	access, says := newAccessLog(t, path, nil)
	log := slog.New(slog.NewJSONHandler(access.records(), nil))
	log.Info("request", "n", 0)
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	access.Reopen()
	eventually(t, "it is opened anew", func() bool { return says.count("opened anew") == 1 })
	log.Info("request", "n", 1)
	// The new file can't be opened: the old one goes on.
	if err := os.Rename(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	access.Reopen()
	eventually(t, "it says why not", func() bool { return says.count("can't be opened anew") == 1 })
	log.Info("request", "n", 2)
	access.Close()
	for suffix, want := range map[string]struct {
		numbers string
		broken  int
	}{".1": {"[0]", 1}, ".2": {"[1,2]", 0}} {
		data, err := os.ReadFile(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		numbers, broken := records(t, strings.Split(strings.TrimSuffix(string(data), "\n"), "\n"))
		if got, _ := json.Marshal(numbers); string(got) != want.numbers || broken != want.broken {
			t.Errorf("%s holds %s and %d broken lines, want %s and %d", suffix, got, broken, want.numbers, want.broken)
		}
	}
}

// TestAccessLogWithoutSpace opens a file that never takes a byte.
func TestAccessLogWithoutSpace(t *testing.T) {
	access, says := newAccessLog(t, "/dev/full", nil)
	slog.New(slog.NewJSONHandler(access.records(), nil)).Info("request", "n", 0)
	eventually(t, "it says so", func() bool { return says.count("can't be written") == 1 })
	access.Close()
	if says.count("dropped_records=1") != 1 {
		t.Error("it does not say that the last record is lost")
	}
}

func TestAccessLogOfFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openAccessLog(path, nil, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "nobody reads") {
		t.Errorf("got %v", err)
	}
}
