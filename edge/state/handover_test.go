package state

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// share is the lock of d as another process would get it.
func share(t *testing.T, d *Dir) *os.File {
	t.Helper()
	lock, err := d.Lock()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(lock.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "lock")
}

func content(t *testing.T, d *Dir, name string) string {
	t.Helper()
	data, err := d.Read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestHandOver passes a directory on: at any moment one of two writes, and no third
// may.
func TestHandOver(t *testing.T) {
	path := t.TempDir()
	before, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	write := func(d *Dir, name, text string) {
		t.Helper()
		if err := d.Write(name, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	write(before, "kept", "1")
	write(before, "gone", "1")
	after, err := Inherit(path, "", share(t, before))
	if err != nil {
		t.Fatal(err)
	}
	write(after, "kept", "2")
	write(after, "fresh", "2")
	if err := after.Remove("gone"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kept", "gone"} {
		if got := content(t, before, name); got != "1" {
			t.Errorf("%s is %q before the hand-over", name, got)
		}
	}
	if kept, fresh, gone := content(t, after, "kept"), content(t, after, "fresh"), content(t, after, "gone"); kept != "2" || fresh != "2" || gone != "(none)" {
		t.Errorf("the successor reads %q, %q and %q", kept, fresh, gone)
	}
	write(before, "old", "1") // it is still the owner

	before.Yield()
	write(before, "kept", "late")
	if err := after.TakeOver(); err != nil {
		t.Fatal(err)
	}
	write(after, "last", "3")
	if err := before.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, ""); !errors.Is(err, ErrLocked) {
		t.Errorf("a third process gets %v", err)
	}
	if err := after.Close(); err != nil {
		t.Fatal(err)
	}
	next, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	for name, want := range map[string]string{"kept": "2", "fresh": "2", "gone": "(none)", "old": "1", "last": "3"} {
		if got := content(t, next, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

// TestHandOverThatFails leaves nothing of a successor that never took over.
func TestHandOverThatFails(t *testing.T) {
	path := t.TempDir()
	before, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if err := os.WriteFile(filepath.Join(path, tempPrefix+"x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	after, err := Inherit(path, "", share(t, before))
	if err != nil {
		t.Fatal(err)
	}
	if err := after.Write("name", []byte("2")); err != nil {
		t.Fatal(err)
	}
	if err := after.Close(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, before, "name"); got != "(none)" {
		t.Errorf("the file is %q", got)
	}
	if _, err := os.Stat(filepath.Join(path, tempPrefix+"x")); err != nil {
		t.Error("the successor removed what the owner was writing:", err)
	}
	if _, err := Open(path, ""); !errors.Is(err, ErrLocked) {
		t.Errorf("a third process gets %v", err)
	}
}

// TestInheritWantsTheLock refuses the lock of another directory.
func TestInheritWantsTheLock(t *testing.T) {
	one, err := Open(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	other := t.TempDir()
	if d, err := Open(other, ""); err != nil || d.Close() != nil {
		t.Fatal(err)
	}
	if _, err := Inherit(other, "", share(t, one)); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v", err)
	}
}
