package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// startTimeout bounds the start of one process; a cold machine with the race
// detector on is slow.
const startTimeout = 60 * time.Second

// Fleet is a control plane with edges, each a process of its own, with files in
// a directory of the test's. All of it ends with the test, which fails when a
// process, a port or a temporary file is left, or when one reported a data
// race.
type Fleet struct {
	TB testing.TB
	// Dir holds all files.
	Dir string
	// Control is the control plane, once started. With several replicas it is
	// the first.
	Control *ControlPlane
	// Env is added to the environment of what is started from now on.
	Env []string

	bin       Binaries
	page      *http.Client
	processes []*process.Process
	addresses []string
	networks  sync.Map // *process.Network by address of a page in it
	manifests atomic.Int64
}

// New prepares a fleet without processes. Its daemons are built with the race
// detector when the test is.
func New(tb testing.TB) *Fleet {
	tb.Helper()
	return newFleet(tb, raceDetector)
}

// NewShipped is New with daemons as users get them, for tests that measure or
// send much.
func NewShipped(tb testing.TB) *Fleet {
	tb.Helper()
	return newFleet(tb, false)
}

func newFleet(tb testing.TB, race bool) *Fleet {
	tb.Helper()
	bin, err := build(race)
	if err != nil {
		tb.Fatal(err)
	}
	f := &Fleet{TB: tb, Dir: tb.TempDir(), bin: bin}
	f.page = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: f.dial}, Timeout: 5 * time.Second}
	if err := os.Mkdir(f.tmp(), 0o700); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(f.end)
	return f
}

// tmp is the TMPDIR of all processes.
func (f *Fleet) tmp() string { return filepath.Join(f.Dir, "tmp") }

// end stops what still runs, the newest first, and looks for what is left.
func (f *Fleet) end() {
	for i := len(f.processes) - 1; i >= 0; i-- {
		p := f.processes[i]
		if err := p.Stop(); err != nil {
			f.TB.Error(err)
		}
		if orphans := p.Orphans(); len(orphans) > 0 {
			f.TB.Errorf("%s left processes behind: %v", p.Name(), orphans)
		}
		output, raced := p.Output(), strings.Contains(p.Output(), "WARNING: DATA RACE")
		if raced {
			f.TB.Errorf("%s has a data race; see its output", p.Name())
		} else {
			output = shorten(output)
		}
		if f.TB.Failed() {
			f.TB.Logf("%s (pid %d) ended with %v and printed:\n%s", p.Name(), p.PID(), p.Err(), output)
		}
	}
	for _, address := range f.addresses {
		if process.Listening(address) == nil {
			f.TB.Errorf("someone still listens on %s", address)
		}
	}
	_ = filepath.WalkDir(f.tmp(), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && path != f.tmp() {
			f.TB.Errorf("temporary file left behind: %s", path)
		}
		return err
	})
}

// shownLines is how many lines of a process's log stand in a test's output.
const shownLines = 40

// shorten leaves of a log what is most telling: warnings, errors and the end. A
// fleet prints more than anybody reads.
func shorten(output string) string {
	lines := strings.SplitAfter(output, "\n")
	end := max(0, len(lines)-shownLines/2)
	var telling []string
	for _, line := range lines[:end] {
		if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, `"level":"DEBUG"`) {
			telling = append(telling, line)
		}
	}
	telling = telling[max(0, len(telling)-shownLines/2):]
	return strings.Join(append(telling, lines[end:]...), "")
}

// Address is a free 127.0.0.1:port that the end of the test expects to be free
// again.
func (f *Fleet) Address() string {
	f.TB.Helper()
	address, err := process.FreeAddress()
	if err != nil {
		f.TB.Fatal(err)
	}
	f.addresses = append(f.addresses, address)
	return address
}

// dial connects to a page, in whatever network it is.
func (f *Fleet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if within, ok := f.networks.Load(address); ok {
		return within.(*process.Network).Dial(ctx, address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

// run starts a process of the fleet. A nil network is that of the test.
func (f *Fleet) run(network *process.Network, name, path string, args ...string) *process.Process {
	f.TB.Helper()
	p, err := process.Start(process.Config{Name: name, Path: path, Args: args, Env: append([]string{"TMPDIR=" + f.tmp()}, f.Env...), Network: network})
	if err != nil {
		f.TB.Fatal(err)
	}
	f.processes = append(f.processes, p)
	return p
}

// ready waits until url answers 200.
func (f *Fleet) ready(p *process.Process, url string) {
	f.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := p.WaitReady(ctx, func(ctx context.Context) error { return f.probe(ctx, url) }); err != nil {
		f.TB.Fatal(err)
	}
}

func (f *Fleet) probe(ctx context.Context, url string) error {
	_, err := f.get(ctx, url)
	return err
}

func (f *Fleet) get(ctx context.Context, url string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := f.page.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answered %s: %s", url, response.Status, bytes.TrimSpace(body))
	}
	return body, err
}

// ControlPlane is a running reseal-controlplane.
type ControlPlane struct {
	*process.Process
	// Address is that of the gRPC services, Page that of /readyz and /metrics.
	Address, Page string
	// DataDir is its --data-dir.
	DataDir string

	fleet       *Fleet
	args        []string
	descriptors int // 0: those of this process
}

// StartControlPlane starts a control plane with an embedded store, unless args
// say otherwise, and waits until it is ready.
func (f *Fleet) StartControlPlane(args ...string) *ControlPlane {
	f.TB.Helper()
	return f.StartControlPlaneWithin(0, args...)
}

// StartControlPlaneWithin is StartControlPlane with so many file descriptors at
// most; 0: as many as this process.
func (f *Fleet) StartControlPlaneWithin(descriptors int, args ...string) *ControlPlane {
	f.TB.Helper()
	c := &ControlPlane{fleet: f, Address: f.Address(), Page: f.Address(), descriptors: descriptors}
	c.DataDir = filepath.Join(f.Dir, "controlplane-"+strings.TrimPrefix(c.Address, "127.0.0.1:"))
	c.args = append([]string{"--data-dir", c.DataDir, "--listen", c.Address, "--http", c.Page}, args...)
	if f.Control == nil {
		f.Control = c
	}
	c.Start()
	return c
}

// Start starts it, again, and waits until it is ready.
func (c *ControlPlane) Start() {
	c.fleet.TB.Helper()
	path, args := c.fleet.bin.ControlPlane, c.args
	if c.descriptors > 0 {
		limited := fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, c.descriptors)
		path, args = "/bin/sh", append([]string{"-c", limited, path}, args...)
	}
	c.Process = c.fleet.run(nil, "reseal-controlplane", path, args...)
	c.fleet.ready(c.Process, "http://"+c.Page+"/readyz")
}

// Run runs a command of reseal-controlplane, such as compact, with what it was started
// with.
func (c *ControlPlane) Run(command string, args ...string) (string, error) {
	c.fleet.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	run := exec.CommandContext(ctx, c.fleet.bin.ControlPlane, append(append([]string{command}, args...), c.args...)...)
	run.Env = append(os.Environ(), "TMPDIR="+c.fleet.tmp())
	output, err := run.CombinedOutput()
	return string(output), err
}

// Metrics reads its /metrics.
func (c *ControlPlane) Metrics() Metrics { return c.fleet.Metrics(c.Page) }

// Edge is a running reseal-edge.
type Edge struct {
	*process.Process
	// ID is its --id.
	ID string
	// Admin is the address of /readyz and /metrics.
	Admin string
	// StateDir is its --state-dir.
	StateDir string
	// AccessLog is the file of its access log.
	AccessLog string
	// Program is the command that Start starts. "": the one that was built.
	Program string

	fleet   *Fleet
	network *process.Network
	args    []string
}

// StartEdge enrols an edge with the fleet's control planes, starts it and waits
// until it is up. It is ready when it has a configuration. It connects to Control
// unless args hold --control-plane.
func (f *Fleet) StartEdge(id, labels string, args ...string) *Edge {
	f.TB.Helper()
	return f.StartEdgeIn(nil, id, labels, args...)
}

// StartEdgeIn is StartEdge in a network. The control planes must be reached from
// there under their addresses.
func (f *Fleet) StartEdgeIn(network *process.Network, id, labels string, args ...string) *Edge {
	f.TB.Helper()
	e := f.newEdge(network, id, labels, args...)
	e.Start()
	return e
}

func (f *Fleet) newEdge(network *process.Network, id, labels string, args ...string) *Edge {
	f.TB.Helper()
	e := &Edge{
		fleet: f, network: network, ID: id, Admin: f.Address(),
		StateDir: filepath.Join(f.Dir, "state-"+id), AccessLog: filepath.Join(f.Dir, "access-"+id+".log"),
	}
	if network != nil {
		f.networks.Store(e.Admin, network)
	}
	if labels != "" {
		args = append([]string{"--labels", labels}, args...)
	}
	token := f.Ctl("token", "create", "--id", id, "--labels", labels, "-o", "name")
	tokenFile := f.WriteFile("token-"+id, token)
	if !slices.Contains(args, "--control-plane") {
		args = append([]string{"--control-plane", f.Control.Address}, args...)
	}
	e.args = append([]string{
		"--id", id, "--state-dir", e.StateDir,
		"--admin", e.Admin, "--join-token-file", tokenFile, "--access-log", e.AccessLog,
	}, args...)
	return e
}

// Start starts it, again, and waits until it is up.
func (e *Edge) Start() {
	e.fleet.TB.Helper()
	program := e.Program
	if program == "" {
		program = e.fleet.bin.Edge
	}
	e.Process = e.fleet.run(e.network, "reseal-edge "+e.ID, program, e.args...)
	e.fleet.ready(e.Process, "http://"+e.Admin+"/healthz")
}

// WaitReady waits until the edge serves a configuration.
func (e *Edge) WaitReady() {
	e.fleet.TB.Helper()
	e.fleet.ready(e.Process, "http://"+e.Admin+"/readyz")
}

// Metrics reads its /metrics.
func (e *Edge) Metrics() Metrics { return e.fleet.Metrics(e.Admin) }

// WriteFile writes a file into Dir and returns its path.
func (f *Fleet) WriteFile(name, text string) string {
	f.TB.Helper()
	path := filepath.Join(f.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		f.TB.Fatal(err)
	}
	return path
}

// Result is what a command did.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// TryCtl runs resealctl as the administrator of the fleet's first control plane.
func (f *Fleet) TryCtl(args ...string) Result {
	f.TB.Helper()
	return f.TryCtlAt(f.Control, args...)
}

// TryCtlAt is TryCtl through another replica of the control plane.
func (f *Fleet) TryCtlAt(c *ControlPlane, args ...string) Result {
	f.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	global := []string{"--config", filepath.Join(f.Control.DataDir, "admin.yaml"), "--control-plane", c.Address}
	command := exec.CommandContext(ctx, f.bin.Ctl, append(global, args...)...)
	command.Env = append(os.Environ(), "TMPDIR="+f.tmp(), "HOME="+f.Dir)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.TB.Fatalf("resealctl %s: %v", strings.Join(args, " "), err)
	}
	return Result{stdout.String(), stderr.String(), command.ProcessState.ExitCode()}
}

// StartCtlAt begins a command that goes on.
func (f *Fleet) StartCtlAt(c *ControlPlane, args ...string) *process.Process {
	f.TB.Helper()
	global := []string{"--config", filepath.Join(f.Control.DataDir, "admin.yaml"), "--control-plane", c.Address}
	return f.run(nil, "resealctl "+args[0], f.bin.Ctl, append(global, args...)...)
}

// Ctl is TryCtl for commands that must succeed; it returns their output.
func (f *Fleet) Ctl(args ...string) string {
	f.TB.Helper()
	result := f.TryCtl(args...)
	if result.Code != 0 {
		f.TB.Fatalf("resealctl %s ended with %d:\n%s%s", strings.Join(args, " "), result.Code, result.Stdout, result.Stderr)
	}
	return result.Stdout
}

// CtlJSON runs a command with -o json and decodes what it prints.
func (f *Fleet) CtlJSON(into any, args ...string) {
	f.TB.Helper()
	output := f.Ctl(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(output), into); err != nil {
		f.TB.Fatalf("resealctl %s: %v in:\n%s", strings.Join(args, " "), err, output)
	}
}

// Manifest writes a manifest to a new file.
func (f *Fleet) Manifest(text string) string {
	f.TB.Helper()
	return f.WriteFile(fmt.Sprintf("manifest-%d.yaml", f.manifests.Add(1)), text)
}

// Apply applies a manifest and returns the revision.
func (f *Fleet) Apply(manifest string) int64 {
	f.TB.Helper()
	path := f.Manifest(manifest)
	var answer struct {
		Revision int64 `json:"revision"`
	}
	f.CtlJSON(&answer, "apply", "-f", path)
	if err := os.Remove(path); err != nil {
		f.TB.Error(err)
	}
	return answer.Revision
}
