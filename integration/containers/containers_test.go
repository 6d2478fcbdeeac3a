// Package containers runs Reseal in containers on networks of its own, from
// images that hold only what this repository builds.
package containers

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

const imageTag = "integration"

var images = []string{"controlplane", "edge", "resealctl", "etcd", "backend"}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fleet is etcd, a control plane, two edges and a backend in containers.
type fleet struct {
	*docker
	authority *peers.Authority
	ctl       string // the resealctl of this test
	config    string // its context file
	edges     map[string]string
	control   string // network of etcd, control plane and edges
}

// TestContainers is one test, since its images and containers are slow to make
// and its steps build on each other.
func TestContainers(t *testing.T) {
	f := &fleet{docker: needDocker(t), edges: map[string]string{}}
	f.build()
	f.up()
	f.apply("one")
	t.Run("main job", f.mainJob)
	t.Run("edge cut off and rejoined", f.cutOff)
	t.Run("containers killed", f.killed)
}

func (f *fleet) build() {
	f.t.Helper()
	cmd := exec.Command("../../deploy/images.sh", imageTag)
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("deploy/images.sh: %v\n%s", err, out)
	}
	f.ctl = filepath.Join(f.t.TempDir(), "resealctl")
	if out, err := exec.Command("go", "build", "-o", f.ctl, "../../cmd/resealctl").CombinedOutput(); err != nil {
		f.t.Fatalf("build resealctl: %v\n%s", err, out)
	}
}

// up starts the containers. etcd is only in the control network, the backend
// only in the back network; clients reach the edges by the front network.
func (f *fleet) up() {
	f.t.Helper()
	var err error
	if f.authority, err = peers.NewAuthority("container test"); err != nil {
		f.t.Fatal(err)
	}
	f.control = f.network("control")
	front, back := f.network("front"), f.network("back")
	store, storeClient, site, backend := f.issue("etcd"), f.issue("controlplane"), f.issue("localhost"), f.issue("backend.internal")
	ca := string(f.authority.PEM())
	f.start(container{
		name: "etcd", image: "etcd", networks: []string{f.control},
		files: map[string]string{"/ca.pem": ca, "/tls.pem": string(store.Certificate), "/tls.key": string(store.Key)},
		args: []string{"--listen-client-urls", "https://0.0.0.0:2379", "--advertise-client-urls", "https://etcd:2379",
			"--client-cert-auth", "--trusted-ca-file", "/ca.pem", "--cert-file", "/tls.pem", "--key-file", "/tls.key", "--log-level", "warn"},
	})
	f.start(container{
		name: "backend", image: "backend", networks: []string{back},
		files: map[string]string{"/backend.pem": string(backend.Certificate), "/backend.key": string(backend.Key)},
		args:  []string{"--cert", "/backend.pem", "--key", "/backend.key"},
	})
	grpcPort := f.freePort()
	f.start(container{
		name: "controlplane", image: "controlplane", networks: []string{f.control},
		publish: []string{"127.0.0.1:" + grpcPort + ":7443"},
		files:   map[string]string{"/ca.pem": ca, "/tls.pem": string(storeClient.Certificate), "/tls.key": string(storeClient.Key)},
		args: []string{"--etcd-endpoints", "https://etcd:2379", "--etcd-ca", "/ca.pem", "--etcd-cert", "/tls.pem", "--etcd-key", "/tls.key",
			"--advertise", "127.0.0.1:" + grpcPort},
	})
	f.config = filepath.Join(f.t.TempDir(), "admin.yaml")
	f.eventually(time.Minute, "the admin context exists", func() error {
		out, err := f.try("cp", f.prefix+"controlplane:/data/admin.yaml", f.config)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	for _, name := range []string{"edge-a", "edge-b"} {
		port := f.freePort()
		f.edges[name] = "127.0.0.1:" + port
		f.start(container{
			name: name, image: "edge", networks: []string{front, f.control, back},
			publish: []string{"127.0.0.1:" + port + ":8443"},
			files: map[string]string{"/token": f.must("token", "create", "--id", name, "-o", "name"),
				"/site.pem": string(site.Certificate), "/site.key": string(site.Key), "/ca.pem": ca},
			args: []string{"--id", name, "--control-plane", "controlplane:7443", "--join-token-file", "/token"},
		})
	}
}

func (f *fleet) issue(name string) peers.Pair {
	f.t.Helper()
	pair, err := f.authority.Issue(name, "localhost", "127.0.0.1")
	if err != nil {
		f.t.Fatal(err)
	}
	return pair
}

func (f *fleet) freePort() string {
	f.t.Helper()
	address, err := process.FreeAddress()
	if err != nil {
		f.t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(address)
	return port
}

const manifests = `
apiVersion: reseal/v1
kind: Certificate
metadata: {name: site}
spec: {certificateFile: /site.pem, privateKeyFile: /site.key}
---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: app}
spec:
  endpoints: [{address: "backend:9443"}]
  protocol: http1
  tls: {serverName: backend.internal, trust: {caFile: /ca.pem}}
---
apiVersion: reseal/v1
kind: Listener
metadata: {name: web}
spec: {address: ":8443", certificates: [site]}
---
apiVersion: reseal/v1
kind: Route
metadata: {name: app}
spec:
  listeners: [web]
  pools: [{name: app}]
  responseHeaders: {set: {X-Configuration: CONFIGURATION}}
`

// apply makes all edges answer with a header that holds name.
func (f *fleet) apply(name string) {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(manifests, "CONFIGURATION", name)), 0o600); err != nil {
		f.t.Fatal(err)
	}
	f.eventually(30*time.Second, "manifests are applied", func() error {
		_, err := f.resealctl("apply", "-f", file, "-m", name)
		return err
	})
}

func (f *fleet) resealctl(args ...string) (string, error) {
	out, err := exec.Command(f.ctl, append([]string{"--config", f.config}, args...)...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("resealctl %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}

func (f *fleet) must(args ...string) string {
	f.t.Helper()
	var out string
	f.eventually(30*time.Second, "resealctl "+args[0], func() (err error) {
		out, err = f.resealctl(args...)
		return err
	})
	return out
}

// configuration asks an edge and returns the header that apply set.
func (f *fleet) configuration(edge string) (string, error) {
	resp, err := f.get(edge, "/hello")
	if err != nil {
		return "", err
	}
	return resp.header.Get("X-Configuration"), nil
}

type answer struct {
	header http.Header
	body   []byte
}

// get asks an edge on a new connection.
func (f *fleet) get(edge, path string) (*answer, error) {
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: f.authority.Pool()},
		DisableKeepAlives: true,
	}
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	resp, err := client.Get("https://" + f.edges[edge] + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", edge, resp.Status, body)
	}
	return &answer{resp.Header, body}, nil
}

func (f *fleet) eventually(limit time.Duration, what string, check func() error) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			f.t.Fatalf("not within %v: %s: %v", limit, what, err)
		case <-ticker.C:
		}
	}
}

// serves waits until an edge answers under a configuration.
func (f *fleet) serves(edge, name string) {
	f.t.Helper()
	f.eventually(time.Minute, edge+" serves configuration "+name, func() error {
		got, err := f.configuration(edge)
		if err == nil && got != name {
			err = fmt.Errorf("it serves %q", got)
		}
		return err
	})
}

// mainJob: traffic through both edges, and the fleet's counts are the backend's.
func (f *fleet) mainJob(t *testing.T) {
	for edge := range f.edges {
		f.serves(edge, "one")
		for range 200 {
			if _, err := f.get(edge, "/hello"); err != nil {
				t.Fatal(err)
			}
		}
	}
	resp, err := f.get("edge-a", "/counts")
	if err != nil {
		t.Fatal(err)
	}
	var backend struct{ Full, Resumed, Requests int64 }
	if err := json.Unmarshal(resp.body, &backend); err != nil {
		t.Fatalf("%v: %s", err, resp.body)
	}
	var stats struct {
		Pools []struct {
			Handshakes struct {
				Full    int64
				Resumed struct{ SessionID, Ticket, PSK int64 }
			}
		}
	}
	if err := json.Unmarshal([]byte(f.must("stats", "pools", "app", "-o", "json")), &stats); err != nil || len(stats.Pools) != 1 {
		t.Fatalf("stats: %v: %+v", err, stats)
	}
	got := stats.Pools[0].Handshakes
	resumed := got.Resumed.SessionID + got.Resumed.Ticket + got.Resumed.PSK
	if got.Full != backend.Full || resumed != backend.Resumed {
		t.Errorf("the fleet counts %d full and %d resumed, the backend %d and %d", got.Full, resumed, backend.Full, backend.Resumed)
	}
	if backend.Resumed == 0 || backend.Full > 10 {
		t.Errorf("%d full and %d resumed handshakes for %d requests", backend.Full, backend.Resumed, backend.Requests)
	}
	t.Logf("%d requests: %d full, %d resumed handshakes at the backend", backend.Requests, backend.Full, backend.Resumed)
}

// cutOff: an edge without a control plane keeps serving what it has, and catches
// up.
func (f *fleet) cutOff(t *testing.T) {
	f.run("network", "disconnect", f.control, f.prefix+"edge-b")
	f.apply("two")
	f.serves("edge-a", "two")
	for range 50 {
		got, err := f.configuration("edge-b")
		if err != nil || got != "one" {
			t.Fatalf("the edge that is cut off: configuration %q, %v", got, err)
		}
	}
	f.eventually(90*time.Second, "the control plane misses the edge", func() error { return f.state("edge-b", "disconnected") })
	f.run("network", "connect", "--alias", "edge-b", f.control, f.prefix+"edge-b")
	f.serves("edge-b", "two")
	f.eventually(30*time.Second, "the edge is in sync", func() error { return f.state("edge-b", "synced") })
}

func (f *fleet) state(edge, want string) error {
	out, err := f.resealctl("get", "edges", "-o", "json")
	if err != nil {
		return err
	}
	var list struct {
		Edges []struct{ ID, State string }
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return err
	}
	for _, e := range list.Edges {
		if e.ID == edge && e.State == want {
			return nil
		}
	}
	return fmt.Errorf("edges: %+v", list.Edges)
}

// killed: an edge that starts while the control plane is dead serves its last
// good configuration; when the control plane is back the fleet is in sync.
func (f *fleet) killed(t *testing.T) {
	f.run("kill", f.prefix+"controlplane")
	if got, err := f.configuration("edge-a"); err != nil || got != "two" {
		t.Fatalf("after the control plane was killed: %q, %v", got, err)
	}
	f.run("kill", f.prefix+"edge-a")
	f.run("start", f.prefix+"edge-a")
	f.serves("edge-a", "two")
	f.run("start", f.prefix+"controlplane")
	for edge := range f.edges {
		f.eventually(time.Minute, edge+" is in sync", func() error { return f.state(edge, "synced") })
	}
	f.apply("three")
	for edge := range f.edges {
		f.serves(edge, "three")
	}
	// Nothing runs as root and nothing was pulled.
	for _, image := range images {
		if user := f.run("image", "inspect", "--format", "{{.Config.User}}", "reseal/"+image+":"+imageTag); user != "65532:65532" {
			t.Errorf("image %s runs as %q", image, user)
		}
	}
}
