package integration

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/process"
)

// TestMakeRun starts `make run` as a newcomer does and ends it as Ctrl-C does,
// with a signal to the whole foreground process group.
func TestMakeRun(t *testing.T) {
	harness.Need(t, "make")
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			root, err := filepath.Abs("..")
			if err != nil {
				t.Fatal(err)
			}
			tmp := t.TempDir()
			run, err := process.Start(process.Config{Name: "make run", Path: "make", Args: []string{"-C", root, "run"}, Env: []string{"TMPDIR=" + tmp}})
			if err != nil {
				t.Fatal(err)
			}
			defer run.Kill()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			if err := run.WaitReady(ctx, func(context.Context) error {
				if !strings.Contains(run.Output(), "curl ") {
					return os.ErrNotExist
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			ports := regexp.MustCompile(`127\.0\.0\.1:\d+|localhost:\d+`).FindAllString(run.Output(), -1)
			if len(ports) == 0 {
				t.Errorf("no address to try in:\n%s", run.Output())
			}
			if err := syscall.Kill(-run.PID(), signal); err != nil {
				t.Fatal(err)
			}
			select {
			case <-run.Done():
			case <-time.After(30 * time.Second):
				t.Fatalf("still runs 30 s after %v:\n%s", signal, run.Output())
			}
			if orphans := run.Orphans(); len(orphans) > 0 {
				t.Errorf("processes left behind: %v", orphans)
			}
			for _, port := range ports {
				if process.Listening(port) == nil {
					t.Errorf("someone still listens on %s", port)
				}
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
				t.Errorf("temporary files left behind: %v (%v)", left, err)
			}
			if _, err := os.Stat(filepath.Join(root, ".run")); !os.IsNotExist(err) {
				t.Errorf(".run is left behind (%v)", err)
			}
			if !strings.Contains(run.Output(), "nothing is left behind") {
				t.Error("it did not say that all has stopped")
			}
			t.Logf("it printed:\n%s", run.Output())
		})
	}
}
