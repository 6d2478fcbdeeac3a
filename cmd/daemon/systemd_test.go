package daemon

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify(Ready); err != nil {
		t.Errorf("without systemd: %v", err)
	}
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Notify(Reloading(), Successor(7), Ready); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 1024)
	n, err := socket.Read(buffer)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(buffer[:n]), "\n")
	if len(lines) != 4 || lines[0] != "RELOADING=1" || lines[2] != "MAINPID=7" || lines[3] != "READY=1" {
		t.Fatalf("%q", lines)
	}
	if usec, err := strconv.ParseInt(strings.TrimPrefix(lines[1], "MONOTONIC_USEC="), 10, 64); err != nil || usec <= 0 {
		t.Errorf("%q", lines[1])
	}
	t.Setenv("NOTIFY_SOCKET", path+"-none")
	if Notify(Ready) == nil {
		t.Error("no error")
	}
}

func TestInheritedIsForThisProcess(t *testing.T) {
	for _, test := range []struct {
		pid, count string
		fails      bool
	}{
		{"", "", false}, {"1", "2", false}, {strconv.Itoa(os.Getpid()), "0", false},
		{strconv.Itoa(os.Getpid()), "many", true}, {strconv.Itoa(os.Getpid()), "-1", true}, {strconv.Itoa(os.Getpid()), "100000", true},
	} {
		t.Setenv("LISTEN_PID", test.pid)
		t.Setenv("LISTEN_FDS", test.count)
		files, err := Inherited()
		if len(files) > 0 || (err != nil) != test.fails {
			t.Errorf("%+v: %v, %v", test, files, err)
		}
		if _, ok := os.LookupEnv("LISTEN_FDS"); ok {
			t.Error("the variable is left for children")
		}
	}
}
