package files

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRead(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, size int) {
		if err := os.WriteFile(path(name), []byte(strings.Repeat("x", size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("small", 5)
	write("empty", 0)
	write("largest", MaxSize)
	write("too-large", MaxSize+1)
	if err := errors.Join(syscall.Mkfifo(path("pipe"), 0o600), os.Mkdir(path("dir"), 0o700),
		os.Symlink(path("small"), path("link")), os.Symlink(path("pipe"), path("link-to-pipe"))); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", path("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	reader := &Reader{Limit: time.Minute}
	for name, size := range map[string]int{"small": 5, "empty": 0, "largest": MaxSize, "link": 5} {
		if data, err := reader.Read(path(name)); err != nil || len(data) != size {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
	}
	for name, want := range map[string]error{
		path("pipe"): ErrKind, path("link-to-pipe"): ErrKind, path("dir"): ErrKind, path("socket"): ErrKind,
		"/dev/zero": ErrKind, "/dev/null": ErrKind, path("too-large"): ErrSize, path("absent"): fs.ErrNotExist,
	} {
		data, err := reader.Read(name)
		var where *fs.PathError
		if !errors.Is(err, want) || !errors.As(err, &where) || data != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A read that does not end is given up, and not begun again while it goes on.
func TestStuckRead(t *testing.T) {
	reader := &Reader{}
	reader.setStuck("/", true)
	if _, err := reader.Read("/"); !errors.Is(err, ErrSlow) {
		t.Errorf("%v", err)
	}
	reader.setStuck("/", false)
	if _, err := reader.Read("/"); !errors.Is(err, ErrKind) {
		t.Errorf("%v", err)
	}
	// Whether the limit is over before the read or not, both sides end.
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte(strings.Repeat("x", MaxSize)), 0o600); err != nil {
		t.Fatal(err)
	}
	hasty := &Reader{Limit: time.Nanosecond}
	for range 50 {
		if data, err := hasty.Read(name); err == nil && len(data) != MaxSize || err != nil && !errors.Is(err, ErrSlow) {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
	}
	for deadline := time.Now().Add(time.Minute); hasty.isStuck(name); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a read that ended counts as stuck for ever")
		}
	}
}
