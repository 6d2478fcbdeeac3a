package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
	"github.com/reseal/reseal/integration/rivals"
)

// site is one of the listeners that every proxy has. They differ in what is behind
// them.
type site int

const (
	siteHTTP1 site = iota // a pool that speaks HTTP/1.1
	siteHTTP2             // a pool that speaks HTTP/2
	siteSink              // HTTP/1.1, takes uploads
	sites
)

// name of a site in manifests.
func (s site) name() string { return [...]string{"http1", "http2", "sink"}[s] }

// Paths of the content. The small one has 1 KiB.
const (
	small = "/1k"
	large = "/large"
)

// clientLimit is how many clients every peer is configured for: half of what the
// usual limit of 20,000 descriptors lets it have. Reseal has its default.
const clientLimit = 8_000

// backendLimit is how many connections the backend takes.
const backendLimit = 15_000

// bed is all that takes part in the measurement. All proxies run at the same time;
// one of them works.
type bed struct {
	options   options
	dir       string
	authority *peers.Authority
	harness   *harness.Site
	backends  [sites]string // addresses
	proxies   []*proxy
	crowd     *proxy  // another edge, with many routes and pools; nil unless linearity is measured
	rate      float64 // requests per second of the workload latency, in this round
	upload    string  // a file of options.bulk bytes
}

// proxy is one that is measured.
type proxy struct {
	key, title string
	sites      [sites]string // addresses
	http2      bool          // whether it speaks HTTP/2 to backends
	newest     bool
	pids       func() ([]int, error)
	restart    func(ctx context.Context) error
	stop       func() error
}

// keyReseal is Reseal's key in flags.
const keyReseal = "reseal"

// newBed starts everything. What was started ends with t, and by end.
func newBed(ctx context.Context, t *harness.Command, dir string, o options) (*bed, error) {
	authority, err := peers.NewAuthority("Reseal benchmark")
	if err != nil {
		return nil, err
	}
	b := &bed{options: o, dir: dir, authority: authority}
	if err := b.startBackends(ctx, t); err != nil {
		return nil, err
	}
	programs := rivals.Programs()
	for _, key := range o.only {
		if key == keyReseal {
			err = t.Try(func() error { return b.startReseal(t) })
		} else {
			i := slices.IndexFunc(programs, func(p rivals.Program) bool { return p.Key == key })
			err = b.startRival(ctx, t, programs[i])
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	return b, nil
}

// folder makes a folder for one program's files.
func (b *bed) folder(name string) (string, error) {
	dir := filepath.Join(b.dir, name)
	return dir, os.MkdirAll(dir, 0o755)
}

// startBackends starts nginx, which serves, and a server in this process, which
// takes uploads. Neither is counted.
func (b *bed) startBackends(ctx context.Context, t *harness.Command) error {
	dir, err := b.folder("content")
	if err != nil {
		return err
	}
	pair, err := b.authority.Issue(peers.ServerName)
	if err != nil {
		return err
	}
	if _, _, _, err := pair.Write(dir, "content"); err != nil {
		return err
	}
	b.upload = filepath.Join(dir, "www", large)
	content := make([]byte, b.options.bulk)
	for i := range content {
		content[i] = byte('a' + i%26)
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(b.upload), 0o755), os.WriteFile(b.upload, content, 0o644)); err != nil {
		return err
	}
	for s := range siteSink {
		if b.backends[s], err = process.FreeAddress(); err != nil {
			return err
		}
	}
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, []byte(contentConfig(b.backends[siteHTTP1], b.backends[siteHTTP2])), 0o600); err != nil {
		return err
	}
	nginx, err := process.Start(process.Config{Name: "backend", Path: "nginx", Args: []string{"-p", dir + "/", "-c", config, "-e", "stderr"}})
	if err != nil {
		return err
	}
	t.Cleanup(func() { stopped(t, nginx.Stop()) })
	if err := nginx.WaitReady(ctx, func(context.Context) error { return process.Listening(b.backends[siteHTTP1]) }); err != nil {
		return err
	}
	sink, err := peers.GoWith(peers.Options{Authority: b.authority}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.Copy(io.Discard, r.Body); err != nil || n != int64(b.options.bulk) {
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	if err != nil {
		return err
	}
	b.backends[siteSink] = sink.Address
	t.Cleanup(func() { stopped(t, sink.Stop()) })
	return nil
}

func stopped(t *harness.Command, err error) {
	if err != nil {
		t.Error(err)
	}
}

// contentConfig is that of the backend that serves: 1 KiB from memory, the large
// file from disk.
func contentConfig(http1, http2 string) string {
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	server := func(address, more string) string {
		return fmt.Sprintf(`  server {
    listen %s ssl%s backlog=8192;
    ssl_certificate content.crt; ssl_certificate_key content.key;
    location = %s { return 200 "%s"; }
    location / { root www; }
  }
`, address, more, small, strings.Repeat("0123456789abcdef", 64))
	}
	return user + fmt.Sprintf(`daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr error;
events { worker_connections %d; }
http {
  access_log off;
  client_body_temp_path tmp-body; proxy_temp_path tmp-proxy; fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi; scgi_temp_path tmp-scgi;
  default_type text/plain;
  keepalive_timeout 300s; keepalive_requests 100000000; keepalive_time 24h;
%s%s}
`, backendLimit, server(http1, ""), server(http2, " http2"))
}

// startRival starts HAProxy or nginx.
func (b *bed) startRival(ctx context.Context, t *harness.Command, program rivals.Program) error {
	version, err := program.Version()
	if err != nil {
		return err
	}
	p := &proxy{key: program.Key, title: program.Name + " " + minor(version), http2: program.Name == "HAProxy", newest: program.New}
	config := rivals.Config{
		Authority: b.authority, Names: []string{harness.SiteName, "*." + harness.SiteName},
		Threads: runtime.NumCPU(), Connections: clientLimit,
	}
	if config.Dir, err = b.folder(program.Key); err != nil {
		return err
	}
	for s := range sites {
		if p.sites[s], err = process.FreeAddress(); err != nil {
			return err
		}
		config.Sites = append(config.Sites, rivals.Site{Address: p.sites[s], Backend: b.backends[s], HTTP2: s == siteHTTP2})
	}
	var running *rivals.Proxy
	p.pids = func() ([]int, error) { return running.PIDs() }
	p.stop = func() error { return running.Stop() }
	p.restart = func(ctx context.Context) (err error) {
		if running != nil {
			if err := running.Stop(); err != nil {
				return err
			}
			_ = os.Remove(filepath.Join(config.Dir, "log"))
		}
		running, err = program.Start(ctx, config)
		return err
	}
	if err := p.restart(ctx); err != nil {
		return err
	}
	t.Cleanup(func() { stopped(t, p.stop()) })
	b.proxies = append(b.proxies, p)
	return nil
}

// minor is major.minor of a version.
func minor(version string) string {
	parts := strings.SplitN(version, ".", 3)
	return strings.Join(parts[:min(2, len(parts))], ".")
}

// startReseal starts a control plane and an edge with defaults.
func (b *bed) startReseal(t *harness.Command) error {
	fleet := harness.NewShipped(t)
	b.harness = &harness.Site{Fleet: fleet, Authority: b.authority}
	fleet.StartControlPlane()
	b.harness.Pair = b.harness.Issue()
	manifest := harness.Certificate("site", b.harness.Pair)
	for s := range sites {
		manifest += b.pool(s.name(), s)
	}
	fleet.Apply(manifest)
	b.startServing(&proxy{key: keyReseal, title: "Reseal", http2: true}, "one", "")
	for i, program := range b.options.against {
		b.startServing(&proxy{key: program, title: program, http2: true}, fmt.Sprintf("against-%d", i), program)
	}
	return nil
}

// startServing starts an edge as p, which has all sites. program is as for
// startEdge.
func (b *bed) startServing(p *proxy, id, program string) {
	var manifest string
	for s := range sites {
		p.sites[s] = b.harness.Address()
		manifest += harness.Listener(s.name()+"-"+id, p.sites[s], "edge: "+id, "  pool: "+s.name()+"\n")
	}
	edge := b.startEdge(p, id, program)
	b.harness.WaitAcked(b.harness.Apply(manifest), edge)
	edge.WaitReady()
	b.proxies = append(b.proxies, p)
}

// startEdge starts an edge as p: the one that was built, or another program. It ends
// with the fleet.
func (b *bed) startEdge(p *proxy, id, program string) *harness.Edge {
	edge := b.harness.StartEdge(id, "edge="+id)
	if program != "" {
		if err := edge.Stop(); err != nil {
			b.harness.TB.Fatal(err)
		}
		edge.Program = program
		edge.Start()
	}
	p.pids = func() ([]int, error) { return []int{edge.PID()}, nil }
	p.restart = func(context.Context) error {
		if err := edge.Stop(); err != nil {
			return err
		}
		edge.Start()
		edge.WaitReady()
		return nil
	}
	return edge
}

// pool is the manifest of a pool in front of a site's backend. More requests may wait,
// and more connections stay, than by default, for the sake of the workload active.
func (b *bed) pool(name string, s site) string {
	protocol := "http1"
	if s == siteHTTP2 {
		protocol = "http2"
	}
	return b.harness.Pool(name, []*peers.Backend{{Address: b.backends[s]}}, "  protocol: "+protocol+"\n  connections: {maxPending: 10000, maxIdlePerEndpoint: 1024}\n")
}

// tls is how clients verify the proxies. They offer what all proxies know, so that
// all do the same work: X25519, since only the newest have its hybrid with ML-KEM, and
// P-256 for the certificate.
func (b *bed) tls() *tls.Config {
	return &tls.Config{
		RootCAs: b.authority.Pool(), ServerName: harness.SiteName, MinVersion: tls.VersionTLS12,
		CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256},
	}
}
