package integration

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

// goPackage is what `go list -json` says of a package.
type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func goList(t *testing.T, args ...string) []goPackage {
	t.Helper()
	args = append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)
	command := exec.Command("go", args...)
	command.Dir = ".."
	var stderr strings.Builder
	command.Stderr = &stderr
	output, err := command.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	var packages []goPackage
	for decoder := json.NewDecoder(strings.NewReader(string(output))); ; {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// TestEdgeDependencies keeps the store, expression languages and the dashboard
// out of the edge's binary.
func TestEdgeDependencies(t *testing.T) {
	packages := goList(t, "./cmd/reseal-edge")
	if len(packages) != 1 || len(packages[0].Deps) < 100 {
		t.Fatalf("go list is not to be trusted: %d packages", len(packages))
	}
	for _, dependency := range packages[0].Deps {
		for _, forbidden := range []string{
			"go.etcd.io/", "cel.dev/", "github.com/google/cel-go", "buf.build/go/protovalidate",
			harness.Module + "/controlplane", harness.Module + "/proto/manifest", harness.Module + "/integration",
		} {
			if strings.HasPrefix(dependency, forbidden) {
				t.Errorf("reseal-edge contains %s", dependency)
			}
		}
	}
}

// TestImports enforces who may import whom. Data flows one way: siblings meet
// in their root package alone.
func TestImports(t *testing.T) {
	packages := goList(t, "./...")
	if len(packages) < 10 {
		t.Fatalf("go list found %d packages only", len(packages))
	}
	for _, p := range packages {
		from := strings.TrimPrefix(p.ImportPath, harness.Module+"/")
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, harness.Module+"/")
			if ours && !mayImport(from, to) {
				t.Errorf("%s imports %s", from, to)
			}
		}
	}
}

// mayImport says whether a package of this module may import another.
func mayImport(from, to string) bool {
	fromTop, _, _ := strings.Cut(from, "/")
	toTop, _, _ := strings.Cut(to, "/")
	switch fromTop {
	case "proto":
		return toTop == "proto"
	case "controlplane", "edge":
		if toTop == "proto" {
			// The edge checks by hand what it needs.
			return to != "proto/manifest" || fromTop == "controlplane" && (from == fromTop || path.Base(from) == "admin")
		}
		// The root package wires its children; children import neither it nor
		// each other. edge/exchange holds the words that both legs have in common,
		// edge/link the way to the control plane, controlplane/mirror the way to
		// what etcd holds, controlplane/fleet how edges are spoken to, controlplane/office who leads; what is below a child is that child's own. A probe
		// tries the protocol of edge/session/abbreviated itself; edge/backend stands
		// on edge/balance and edge/conn. Both legs run on edge/loop and speak by the
		// machines edge/http1 and edge/http2; edge/legtest, which only tests use,
		// shows legs as net/http would see them.
		return toTop == fromTop && to != "edge/legtest" && (from == fromTop || to == "edge/exchange" || to == "edge/link" || to == "controlplane/mirror" || to == "controlplane/fleet" || to == "controlplane/office" || strings.HasPrefix(to, from+"/") ||
			(from == "edge/frontend" || from == "edge/backend" || from == "edge/backend/h2") && (to == "edge/loop" || to == "edge/http1" || to == "edge/http2") ||
			(from == "edge/conn" || from == "edge/legtest" || from == "edge/backend/crossing") && to == "edge/loop" ||
			from == "edge/probe" && to == "edge/session/abbreviated" || from == "edge/backend" && (to == "edge/balance" || to == "edge/conn"))
	case "cmd":
		return toTop == "proto" || toTop == "controlplane" || toTop == "edge" || toTop == "cmd"
	case "integration":
		// Simulated edges connect as real ones do.
		return toTop == "proto" || toTop == "integration" || from == "integration/fleetsim" && to == "edge/link"
	}
	return false
}

func TestMayImport(t *testing.T) {
	tests := []struct {
		from, to string
		want     bool
	}{
		{"controlplane", "controlplane/store", true},
		{"controlplane", "edge/feed", false},
		{"edge", "controlplane", false},
		{"edge", "edge/plan", true},
		{"edge/plan", "edge/feed", false},
		{"edge/frontend", "edge/exchange", true},
		{"edge/exchange", "edge/frontend", false},
		{"edge/backend", "edge/balance", true},
		{"edge/balance", "edge/backend", false},
		{"edge/backend", "edge/conn", true},
		{"edge/backend", "edge/backend/h2", true},
		{"edge/backend/h2", "edge/http2", true},
		{"edge/backend/h2", "edge/backend", false},
		{"edge/backend/crossing", "edge/loop", true},
		{"edge/backend/crossing", "edge/http2", false},
		{"edge/conn", "edge/loop", true},
		{"edge/conn", "edge/http1", false},
		{"edge/conn", "edge/backend", false},
		{"edge/conn", "edge/balance", false},
		{"edge/balance", "edge/exchange", true},
		{"edge/frontend", "edge/balance", false},
		{"edge/frontend", "edge/http2", true},
		{"edge/backend", "edge/loop", true},
		{"edge/conn", "edge/http1", false},
		{"edge/loop", "edge/http1", false},
		{"edge/http2", "edge/loop", false},
		{"edge/legtest", "edge/loop", true},
		{"edge/frontend", "edge/legtest", false},
		{"edge/backend", "edge/legtest", false},
		{"edge/feed", "edge/link", true},
		{"edge/link", "edge/feed", false},
		{"integration/fleetsim", "edge/link", true},
		{"integration/fleetsim", "edge/feed", false},
		{"integration/harness", "edge/link", false},
		{"controlplane/feed", "edge/exchange", false},
		{"controlplane/trust", "controlplane/mirror", true},
		{"controlplane/feed", "controlplane/fleet", true},
		{"controlplane/keyring", "controlplane/office", true},
		{"controlplane/office", "controlplane/keyring", false},
		{"controlplane/budget", "controlplane/fleet", true},
		{"controlplane/budget", "controlplane/keyring", false},
		{"controlplane/fleet", "controlplane/feed", false},
		{"controlplane/mirror", "controlplane/trust", false},
		{"edge/session", "edge/session/abbreviated", true},
		{"edge/session/abbreviated", "edge/session", false},
		{"edge/probe", "edge/session/abbreviated", true},
		{"edge/probe", "edge/session", false},
		{"edge/backend", "edge/session/abbreviated", false},
		{"edge/plan", "proto/reseal/v1", true},
		{"edge/plan", "proto/manifest", false},
		{"controlplane/store", "proto/reseal/v1", true},
		{"controlplane/store", "proto/manifest", false},
		{"controlplane/feed", "controlplane", false},
		{"proto/manifest", "proto/reseal/v1", true},
		{"proto/reseal/v1", "edge", false},
		{"cmd/reseal-edge", "edge", true},
		{"edge", "cmd/daemon", false},
		{"edge/feed", "integration/peers", false},
	}
	for _, test := range tests {
		if got := mayImport(test.from, test.to); got != test.want {
			t.Errorf("%s imports %s: %t, want %t", test.from, test.to, got, test.want)
		}
	}
}
