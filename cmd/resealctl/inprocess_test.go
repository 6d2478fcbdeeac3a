package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// session is a command that runs in this process.
type session struct {
	t        *testing.T
	stop     context.CancelFunc
	out, err *output
	exit     chan int
}

// output collects what a command writes while a test reads it.
type output struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.data.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.data.String()
}

// start runs a command against f, as an admin.
func start(t *testing.T, f *fakeServer, terminal bool, stdin string, args ...string) *session {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	certPEM, keyPEM, err := f.authority.issue("spiffe://reseal/admin/alice", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	err = writeContexts(path, &contextFile{CurrentContext: "local", Contexts: []namedContext{{
		Name: "local", ControlPlane: []string{f.address}, TrustDomain: "reseal",
		CAPEM: string(f.authority.pem), CertificatePEM: string(certPEM), PrivateKeyPEM: string(keyPEM),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	s := &session{t: t, stop: stop, out: &output{}, err: &output{}, exit: make(chan int, 1)}
	environment := map[string]string{"RESEAL_CONFIG": path}
	go func() {
		s.exit <- run(ctx, args, console{in: strings.NewReader(stdin), out: s.out, err: s.err,
			getenv: func(name string) string { return environment[name] }, terminal: terminal})
	}()
	t.Cleanup(stop)
	return s
}

func (s *session) waitFor(text string) {
	s.t.Helper()
	waitFor(s.t.Fatalf, fmt.Sprintf("%q in the output", text), func() bool { return strings.Contains(s.out.String(), text) })
}

// interrupt ends the command as Ctrl-C does. Watches then end in good order.
func (s *session) interrupt() string {
	s.t.Helper()
	s.stop()
	s.ends(0)
	if text := s.err.String(); text != "" {
		s.t.Errorf("stderr after an interrupt: %s", text)
	}
	return s.out.String()
}

func (s *session) ends(code int) {
	s.t.Helper()
	if got := <-s.exit; got != code {
		s.t.Fatalf("exit code %d, want %d; stderr: %s", got, code, s.err)
	}
}

func pool(name, address string) string {
	return fmt.Sprintf("apiVersion: reseal/v1\nkind: BackendPool\nmetadata: {name: %s}\nspec: {endpoints: [{address: %q}]}\n", name, address)
}

func runToEnd(t *testing.T, f *fakeServer, stdin string, args ...string) string {
	t.Helper()
	s := start(t, f, false, stdin, args...)
	s.ends(0)
	return s.out.String()
}

func TestWatchAppendsRows(t *testing.T) {
	f := newFake(t)
	runToEnd(t, f, pool("jetty", "127.0.0.1:1"), "apply", "-f", "-")
	s := start(t, f, false, "", "get", "pools", "-w")
	s.waitFor("jetty")
	runToEnd(t, f, pool("jetty", "127.0.0.1:22"), "apply", "-f", "-")
	s.waitFor("127.0.0.1:22")
	runToEnd(t, f, pool("a-much-longer-name", "127.0.0.1:3"), "apply", "-f", "-")
	s.waitFor("a-much-longer-name")
	runToEnd(t, f, "", "delete", "pool", "jetty")
	s.waitFor("<deleted>")
	want := `NAME    ENDPOINTS     PROTOCOL   SNI      SESSIONS   AGE
jetty   127.0.0.1:1   auto       <host>   auto       0s
jetty   127.0.0.1:22   auto       <host>   auto       0s
a-much-longer-name   127.0.0.1:3    auto       <host>   auto       0s
jetty                <deleted>
`
	if got := s.interrupt(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestWatchStreamsDocuments(t *testing.T) {
	f := newFake(t)
	runToEnd(t, f, pool("jetty", "127.0.0.1:1"), "apply", "-f", "-")
	json := start(t, f, false, "", "get", "all", "-w", "-o", "json")
	yaml := start(t, f, false, "", "get", "pool", "jetty", "-w", "-o", "yaml")
	names := start(t, f, false, "", "get", "pools", "-w", "-o", "name")
	all := start(t, f, false, "", "get", "all", "-w")
	for _, s := range []*session{json, yaml, names, all} {
		s.waitFor("jetty")
	}
	runToEnd(t, f, pool("other", "127.0.0.1:1"), "apply", "-f", "-")
	runToEnd(t, f, "", "delete", "pool", "jetty")
	json.waitFor(`"deleted": true`)
	yaml.waitFor("deleted: true")
	names.waitFor("deleted")
	all.waitFor("<deleted>")
	if got := names.interrupt(); got != "backendpool/jetty\nbackendpool/other\nbackendpool/jetty deleted\n" {
		t.Errorf("names: %s", got)
	}
	got := yaml.interrupt()
	if strings.Contains(got, "other") || strings.Count(got, "---\n") != 1 ||
		!strings.HasSuffix(got, "---\napiVersion: reseal/v1\nkind: BackendPool\nmetadata:\n  name: jetty\ndeleted: true\n") {
		t.Errorf("yaml: %s", got)
	}
	if got := json.interrupt(); strings.Count(got, "\n}\n") != 3 || strings.Contains(got, "---") {
		t.Errorf("json: %s", got)
	}
	if got := all.interrupt(); !strings.Contains(got, "\nbackendpool/other") {
		t.Errorf("all: %s", got)
	}
}

func TestWatchEdges(t *testing.T) {
	f := newFake(t)
	table := start(t, f, false, "", "get", "edges", "-w")
	json := start(t, f, false, "", "get", "edges", "-w", "-o", "json")
	names := start(t, f, false, "", "get", "edges", "-w", "-o", "name", "-l", "zone=us")
	table.waitFor("REFUSED")
	json.waitFor("edge-2")
	names.waitFor("edge-2")
	f.change(func() {
		f.edges[1].State, f.edges[1].Nack, f.edges[1].AckedRevision = resealv1.Edge_STATE_SYNCED, nil, 7
	})
	table.waitFor("edge-2   SYNCED")
	f.change(func() { f.edges = f.edges[:1] })
	table.waitFor("<gone>")
	json.waitFor(`"deleted": true`)
	names.waitFor("edge/edge-2 deleted")
	if got := table.interrupt(); strings.Count(got, "edge-1") != 1 || strings.Count(got, "edge-2") != 3 {
		t.Errorf("only what changed is written again:\n%s", got)
	}
	json.interrupt()
	names.interrupt()
}

// TestWatchReset: a replica that lost its place sends everything again.
func TestWatchReset(t *testing.T) {
	var out bytes.Buffer
	w := &resourceWatch{
		getter: &getter{app: &app{console: console{out: &out}}, format: &format{value: "name"},
			selection: &selection{names: map[string][]string{"BackendPool": nil}}},
		kind: "BackendPool", shown: map[string]*resealv1.Resource{},
	}
	resource := func(name string, revision int64) *resealv1.Resource {
		r := resealv1.NewResource("BackendPool")
		r.Metadata.Name, r.Metadata.Revision = name, revision
		return r
	}
	for _, response := range []*resealv1.WatchResponse{
		{Reset_: true, Resources: []*resealv1.Resource{resource("a", 1), resource("b", 1), resource("c", 1)}},
		{Reset_: true, Resources: []*resealv1.Resource{resource("a", 1), resource("b", 2)}},
		{Deletes: []*resealv1.ResourceRef{{Kind: "BackendPool", Name: "never-seen"}}},
	} {
		if err := w.show(response); err != nil {
			t.Fatal(err)
		}
	}
	want := "backendpool/a\nbackendpool/b\nbackendpool/c\nbackendpool/b\nbackendpool/c deleted\n"
	if out.String() != want {
		t.Errorf("got %s", &out)
	}
}

func TestWatchStats(t *testing.T) {
	f := newFake(t)
	table := start(t, f, false, "", "stats", "pools", "-w")
	yaml := start(t, f, false, "", "stats", "pools", "-w", "-o", "yaml")
	table.waitFor("why full")
	yaml.waitFor("pools:")
	f.change(func() {
		f.stats = proto.CloneOf(f.stats)
		f.stats.Pools[0].Requests = 4711
	})
	table.waitFor("4711")
	yaml.waitFor("---\npools:")
	table.stop()
	table.ends(0)
	yaml.stop()
	yaml.ends(0)
}

func TestTopOnATerminal(t *testing.T) {
	f := newFake(t)
	s := start(t, f, true, "", "top", "--interval", "100ms")
	s.waitFor("POOL")
	waitFor(t.Fatalf, "a second frame", func() bool { return strings.Count(s.out.String(), "\x1b[H") >= 2 })
	f.change(func() { f.unwell = true })
	s.waitFor("etcd does not answer")
	f.change(func() { f.unwell = false })
	frames := strings.Count(s.out.String(), "\x1b[H")
	waitFor(t.Fatalf, "frames after the failure", func() bool { return strings.Count(s.out.String(), "\x1b[H") > frames+1 })
	if got := s.interrupt(); !strings.Contains(got, "No new report from edge-2") {
		t.Errorf("stale edges are not named: %q", got)
	}
}

func TestDiffColours(t *testing.T) {
	f := newFake(t)
	for _, terminal := range []bool{true, false} {
		s := start(t, f, terminal, pool("jetty", "127.0.0.1:1"), "diff", "-f", "-")
		s.ends(1)
		if got := strings.Contains(s.out.String(), "\x1b["); got != terminal {
			t.Errorf("terminal %v: escape sequences %v in %q", terminal, got, s.out)
		}
	}
}

func TestDrainGivesUp(t *testing.T) {
	f := newFake(t)
	s := start(t, f, true, "", "drain", "edge-2", "--wait")
	waitFor(t.Fatalf, "progress", func() bool { return strings.Contains(s.err.String(), "client connections left") })
	f.change(func() { f.edges[1].State = resealv1.Edge_STATE_DISCONNECTED })
	s.ends(1)
	if got := s.err.String(); !strings.HasSuffix(got, "Error: edge \"edge-2\" is no longer connected\n") {
		t.Errorf("stderr %q", got)
	}
}

// TestLargeList: the answer may be far larger than gRPC's default of 4 MiB.
func TestLargeList(t *testing.T) {
	f := newFake(t)
	f.change(func() {
		for i := range 9 {
			r := resealv1.NewResource("BackendPool")
			r.Metadata.Name = fmt.Sprint("pool-", i)
			r.Metadata.Annotations = map[string]string{"note": strings.Repeat("x", 1<<20)}
			f.resources[r.Ref().Key()] = r
		}
	})
	if got := runToEnd(t, f, "", "get", "pools", "-o", "name"); strings.Count(got, "\n") != 9 {
		t.Errorf("got %s", got)
	}
}

// failingWriter is a full disk.
type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

func TestFullDiskIsAnError(t *testing.T) {
	var stderr bytes.Buffer
	code := run(t.Context(), []string{"explain", "pool"}, console{in: strings.NewReader(""), out: failingWriter{}, err: &stderr, getenv: os.Getenv})
	if code != 1 || !strings.Contains(stderr.String(), "no space left") {
		t.Errorf("exit code %d, stderr %s", code, &stderr)
	}
}
