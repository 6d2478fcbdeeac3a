package frontend

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestOutOfDescriptors: connections that can't be accepted for want of
// descriptors wait, those that are there are still served, and accepting goes on
// when there are descriptors again.
func TestOutOfDescriptors(t *testing.T) {
	e := newEdge(t, answering("ok"))
	old := e.dial()
	answers := bufio.NewReader(old)
	ask := func() {
		t.Helper()
		fmt.Fprint(old, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
		bodyOf(t, must[*http.Response](t)(http.ReadResponse(answers, nil)))
	}
	ask()

	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	low := before
	low.Cur = 256
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	restore := func() {
		for _, file := range files {
			file.Close()
		}
		files = nil
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	}
	defer restore()
	for {
		file, err := os.Open(os.DevNull)
		if err != nil {
			break // all are used
		}
		files = append(files, file)
	}
	files[0].Close() // one for the client
	files = files[1:]
	e.raw()
	time.Sleep(50 * time.Millisecond) // it is tried in vain
	ask()
	if opened := read(e.count("main"), func(c *counts) int { return c.opened }); opened != 1 {
		t.Errorf("%d connections were accepted without descriptors", opened)
	}
	restore()
	eventually(t, "the connection that waited is accepted", func() bool {
		return read(e.count("main"), func(c *counts) bool { return c.opened == 2 })
	})
	ask()
}
