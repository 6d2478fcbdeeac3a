package state

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, dir, key string) *Dir {
	t.Helper()
	d, err := Open(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func write(t *testing.T, d *Dir, name, data string) {
	t.Helper()
	if err := d.Write(name, []byte(data)); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not mention %q", err, word)
		}
	}
}

func TestWriteThenRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state")
	d := open(t, dir, "")
	if _, err := d.Read("identity"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("absent file: %v", err)
	}
	write(t, d, "identity", "first")
	write(t, d, "identity", "the secret content")
	write(t, d, "empty", "")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	d = open(t, dir, "")
	for name, want := range map[string]string{"identity": "the secret content", "empty": ""} {
		if got, err := d.Read(name); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(dir, "identity"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(raw, []byte("secret")) {
		t.Error("the file is not sealed")
	}
	for range 2 {
		if err := d.Remove("identity"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Read("identity"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed file: %v", err)
	}
}

func TestModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	d := open(t, dir, "")
	write(t, d, "identity", "x")
	for name, want := range map[string]fs.FileMode{"": 0o700, "lock": 0o600, "key": 0o600, "identity": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%q has mode %o, want %o", name, info.Mode().Perm(), want)
		}
	}
}

func TestSecondProcess(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, "")
	_, err := Open(dir, "")
	wantError(t, err, ErrLocked, dir, "--state-dir")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, "")
}

func TestDamaged(t *testing.T) {
	damages := map[string]func([]byte) []byte{
		"empty":         func([]byte) []byte { return nil },
		"cut header":    func(b []byte) []byte { return b[:headerSize-1] },
		"cut nonce":     func(b []byte) []byte { return b[:headerSize+5] },
		"cut end":       func(b []byte) []byte { return b[:len(b)-1] },
		"longer":        func(b []byte) []byte { return append(b, 0) },
		"changed magic": func(b []byte) []byte { b[0]++; return b },
		"new version":   func(b []byte) []byte { b[len(magic)]++; return b },
		"changed id":    func(b []byte) []byte { b[len(magic)+1]++; return b },
		"changed nonce": func(b []byte) []byte { b[headerSize]++; return b },
		"changed text":  func(b []byte) []byte { b[len(b)-20]++; return b },
		"zeros":         func(b []byte) []byte { return make([]byte, len(b)) },
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir, "")
			write(t, d, "snapshot", "some longer content")
			path := filepath.Join(dir, "snapshot")
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = d.Read("snapshot")
			wantError(t, err, ErrDamaged, path)
			write(t, d, "snapshot", "again")
			if got, err := d.Read("snapshot"); err != nil || string(got) != "again" {
				t.Errorf("after a new write: %q, %v", got, err)
			}
		})
	}
}

func TestRenamedFileIsDamaged(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, "")
	write(t, d, "one", "content")
	if err := os.Rename(filepath.Join(dir, "one"), filepath.Join(dir, "two")); err != nil {
		t.Fatal(err)
	}
	_, err := d.Read("two")
	wantError(t, err, ErrDamaged, "two")
}

func TestTooLarge(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, "")
	wantError(t, d.Write("big", make([]byte, MaxSize+1)), ErrTooLarge, "big")
	path := filepath.Join(dir, "big")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(MaxSize+overhead+1)); err != nil { // sparse
		t.Fatal(err)
	}
	_, err := d.Read("big")
	wantError(t, err, ErrDamaged, path)
}

func TestNames(t *testing.T) {
	d := open(t, t.TempDir(), "")
	for _, name := range []string{"", ".", "..", "../x", "a/b", ".hidden", "key", "lock", "A", "a b", "ä", "a\x00", strings.Repeat("a", 101)} {
		wantError(t, d.Write(name, nil), ErrName)
		_, err := d.Read(name)
		wantError(t, err, ErrName)
		wantError(t, d.Remove(name), ErrName)
	}
}

func TestKeyFile(t *testing.T) {
	raw := bytes.Repeat([]byte{7}, keySize)
	encoded := []byte(base64.StdEncoding.EncodeToString(raw) + "\n")
	for name, text := range map[string][]byte{"raw": raw, "base64": encoded} {
		t.Run(name, func(t *testing.T) {
			key := filepath.Join(t.TempDir(), "k")
			if err := os.WriteFile(key, text, 0o600); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			d := open(t, dir, key)
			write(t, d, "x", "content")
			if _, err := os.Stat(filepath.Join(dir, "key")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("dir/key: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			d = open(t, dir, key)
			if got, err := d.Read("x"); err != nil || string(got) != "content" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	for name, text := range map[string]string{"empty": "", "short": "aGVsbG8=", "not base64": "topsecretkey!!", "huge": strings.Repeat("a", 5000)} {
		t.Run(name, func(t *testing.T) {
			key := filepath.Join(t.TempDir(), "k")
			if err := os.WriteFile(key, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(t.TempDir(), key)
			wantError(t, err, ErrKey, key)
			if text != "" && strings.Contains(err.Error(), text) {
				t.Error("the error quotes the key")
			}
			if got, err := os.ReadFile(key); err != nil || string(got) != text {
				t.Errorf("the key file was changed: %q, %v", got, err)
			}
		})
	}
}

func TestLostOrWrongKey(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, "")
	write(t, d, "identity", "x")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key")
	kept := key + ".kept"
	if err := os.Rename(key, kept); err != nil {
		t.Fatal(err)
	}
	_, err := Open(dir, "")
	wantError(t, err, ErrKey, key, "does not exist")
	if _, err := os.Stat(key); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("a key was generated over sealed files")
	}
	if err := os.WriteFile(key, bytes.Repeat([]byte{1}, keySize), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(dir, "")
	wantError(t, err, ErrKey, "identity", key)

	if err := os.Rename(kept, key); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, "")
	if got, err := d.Read("identity"); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestLeftoverOfACrash(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, tempPrefix+"123")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, dir, "")
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("leftover: %v", err)
	}
}

func TestClosed(t *testing.T) {
	d := open(t, t.TempDir(), "")
	for range 2 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := d.Read("x")
	wantError(t, err, fs.ErrClosed)
	wantError(t, d.Write("x", nil), fs.ErrClosed)
	wantError(t, d.Remove("x"), fs.ErrClosed)
}

func TestWriteFailureKeepsOld(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, "")
	// A directory in the file's place makes the rename fail.
	if err := os.MkdirAll(filepath.Join(dir, "taken", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.Write("taken", []byte("x")); err == nil {
		t.Fatal("no error")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), tempPrefix) {
			t.Errorf("%s was left behind", entry.Name())
		}
	}
}

func TestSealerProperties(t *testing.T) {
	s, err := newSealer(bytes.Repeat([]byte{3}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a-z][a-z0-9._-]{0,20}`).Draw(t, "name")
		data := rapid.SliceOf(rapid.Byte()).Draw(t, "data")
		sealed := s.seal(name, data)
		if len(sealed) != len(data)+overhead {
			t.Fatalf("%d bytes sealed are %d", len(data), len(sealed))
		}
		got, err := s.open(name, sealed)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%x, %v", got, err)
		}
		sealed[rapid.IntRange(0, len(sealed)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := s.open(name, sealed); err == nil {
			t.Fatal("a changed file was read")
		}
	})
}

func FuzzOpenSealed(f *testing.F) {
	s, err := newSealer(bytes.Repeat([]byte{3}, keySize))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(nil))
	f.Add([]byte(magic))
	f.Add(s.header)
	f.Add(append(append([]byte(nil), s.header...), make([]byte, 28)...))
	f.Fuzz(func(t *testing.T, sealed []byte) {
		if data, err := s.open("x", sealed); err == nil {
			t.Fatalf("invented file read as %x", data)
		}
	})
}
