package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// TestBackup: after the loss of the store a backup brings back what there was, and the
// edges with it; the file alone tells nothing, and is of no use without the key.
func TestBackup(t *testing.T) {
	w := newWorld(t)
	plane := w.StartControlPlane()
	edge := w.StartEdge("one", "")
	backend := w.Launch(t, peers.Go, peers.Options{})
	address := w.Address()
	w.Apply(harness.Certificate("site", w.Pair) + w.Pool("app", []*peers.Backend{backend}, "") + harness.Listener("web", address, "", "  pool: app\n"))
	w.WaitAcked(w.Apply(harness.Route("app", "web", harness.SiteName, "app", "")), edge)
	before := w.Ctl("get", "all", "-o", "name")
	file := filepath.Join(w.Dir, "backup")
	if result := w.TryCtl("backup", file); result.Code != 0 || !strings.Contains(result.Stdout, " keys in ") {
		t.Fatalf("%+v", result)
	}
	data, err := os.ReadFile(file)
	if info, _ := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 || strings.Contains(string(data), harness.SiteName) {
		t.Errorf("the file is readable: %v, %v", info.Mode(), err)
	}
	w.Apply(w.Pool("later", []*peers.Backend{backend}, "")) // not in the backup

	if output, err := plane.Run("restore", file); err == nil || !strings.Contains(output, "stop it first") {
		t.Errorf("while it runs: %v: %s", err, output)
	}
	if err := plane.Stop(); err != nil {
		t.Error(err)
	}
	if output, err := plane.Run("restore", file); err == nil || !strings.Contains(output, "not empty") {
		t.Errorf("into the old store: %v: %s", err, output)
	}
	if err := os.RemoveAll(filepath.Join(plane.DataDir, "etcd")); err != nil {
		t.Fatal(err)
	}
	kek := filepath.Join(plane.DataDir, "kek")
	if err := os.Rename(kek, kek+".away"); err != nil {
		t.Fatal(err)
	}
	if output, err := plane.Run("restore", file); err == nil || !strings.Contains(output, "--kek-file") {
		t.Errorf("without the key: %v: %s", err, output)
	}
	if err := os.Rename(kek+".away", kek); err != nil {
		t.Fatal(err)
	}
	if output, err := plane.Run("restore", file); err != nil || !strings.Contains(output, "restored ") {
		t.Fatalf("%v: %s", err, output)
	}
	plane.Start()
	if after := w.Ctl("get", "all", "-o", "name"); after != before {
		t.Errorf("restored:\n%swant:\n%s", after, before)
	}
	if history := w.Ctl("history"); strings.Count(history, "\n") < 4 {
		t.Errorf("the history:\n%s", history)
	}
	w.WaitAcked(w.Apply(harness.Route("app", "web", "other."+harness.SiteName, "app", "")), edge)
	if result := w.TryCtl("rollback"); result.Code != 0 {
		t.Errorf("a rollback: %+v", result)
	}
	if status := w.Ctl("status"); strings.Contains(status, "Problems") {
		t.Error(status)
	}
}
