package integration

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

// TestReloadSignals plays logrotate: the access log is renamed and the edge gets
// SIGUSR1 or SIGHUP. Neither signal ends a daemon.
func TestReloadSignals(t *testing.T) {
	s := newStage(t)
	client := s.Client(t, s.address, false)
	requests := 0
	request := func() {
		t.Helper()
		response, err := client.Get("https://" + harness.SiteName + "/nothing")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != 404 {
			t.Fatal(response.Status, err)
		}
		requests++
	}
	recorded := func(file string, want int) {
		t.Helper()
		harness.Settle(t, func() error {
			data, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if got := bytes.Count(data, []byte("/nothing")); got != want {
				return fmt.Errorf("%d records in %s, want %d", got, file, want)
			}
			return nil
		})
	}
	for i, signal := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGHUP} {
		request()
		request()
		recorded(s.edge.AccessLog, 2)
		rotated := fmt.Sprint(s.edge.AccessLog, ".", i)
		if err := os.Rename(s.edge.AccessLog, rotated); err != nil {
			t.Fatal(err)
		}
		s.edge.Process.Signal(signal)
		s.Control.Process.Signal(signal)
		harness.Settle(t, func() error { _, err := os.Stat(s.edge.AccessLog); return err })
		request()
		recorded(s.edge.AccessLog, 1)
		recorded(rotated, 2)
		if err := os.Remove(s.edge.AccessLog); err != nil {
			t.Fatal(err)
		}
		s.edge.Process.Signal(signal)
		harness.Settle(t, func() error { _, err := os.Stat(s.edge.AccessLog); return err })
	}
	s.Ctl("get", "edges") // the control plane lives, too
	if dropped := s.edge.Metrics().Sum("reseal_access_log_dropped_total"); dropped != 0 {
		t.Errorf("%v records dropped", dropped)
	}
}
