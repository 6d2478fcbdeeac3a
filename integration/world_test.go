// Package integration tests Reseal end to end: real processes of this
// repository between real clients and real backends.
package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

func TestMain(m *testing.M) {
	code := harness.Main(m)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// siteName is the name in the certificate that clients see, beside all names
// below it.
const siteName = "site.test"

// long reports whether the tests run at the size of the acceptance list instead
// of a tenth of it.
func long() bool { return os.Getenv("RESEAL_LONG") != "" }

// world is a fleet with what its manifests and clients need.
type world struct {
	*harness.Fleet
	t         *testing.T
	authority *peers.Authority
	site      peers.Pair
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, harness.New(t))
}

func newWorldOf(t *testing.T, fleet *harness.Fleet) *world {
	t.Helper()
	w := &world{t: t, Fleet: fleet}
	var err error
	if w.authority, err = peers.NewAuthority("integration test"); err != nil {
		t.Fatal(err)
	}
	w.site = w.issue()
	return w
}

// issue makes a certificate for the site.
func (w *world) issue() peers.Pair {
	w.t.Helper()
	pair, err := w.authority.Issue(siteName, "*."+siteName)
	if err != nil {
		w.t.Fatal(err)
	}
	return pair
}

// launch starts a backend for the length of t, or skips t when its program is
// not installed.
func (w *world) launch(t *testing.T, start func(context.Context, peers.Options) (*peers.Backend, error), o peers.Options) *peers.Backend {
	t.Helper()
	o.Authority, o.Dir = w.authority, t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	backend, err := start(ctx, o)
	if errors.Is(err, process.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := backend.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("%s printed:\n%s", backend.Name, backend.Output())
		}
	})
	return backend
}

// indent puts PEM into a YAML block.
func indent(text []byte, spaces int) string {
	pad := strings.Repeat(" ", spaces)
	return pad + strings.ReplaceAll(strings.TrimSpace(string(text)), "\n", "\n"+pad)
}

// certificate is a manifest of the site's certificate.
func (w *world) certificate(name string, pair peers.Pair) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: Certificate
metadata: {name: %s}
spec:
  certificatePem: |
%s
  privateKeyPem: |
%s
`, name, indent(pair.Certificate, 4), indent(pair.Key, 4))
}

// listener is a manifest of an https listener with the certificate "site". The
// selector holds labels as "k: v", empty for all edges.
func listener(name, address, selector, more string) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: Listener
metadata: {name: %s}
spec:
  address: %s
  edgeSelector: {matchLabels: {%s}}
  certificates: [site]
%s`, name, address, selector, more)
}

// pool is a manifest of a pool whose endpoints are backends of the test's
// authority.
func (w *world) pool(name string, backends []*peers.Backend, more string) string {
	var endpoints strings.Builder
	for _, backend := range backends {
		fmt.Fprintf(&endpoints, "    - {address: %q}\n", backend.Address)
	}
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: %s}
spec:
  endpoints:
%s  tls:
    serverName: %s
    trust:
      caPem: |
%s
%s`, name, endpoints.String(), peers.ServerName, indent(w.authority.PEM(), 8), more)
}

// route is a manifest that sends a host of a listener to a pool.
func route(name, listener, host, pool, more string) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: Route
metadata: {name: %s}
spec:
  listeners: [%s]
  hosts: [%s]
  pools: [{name: %s}]
%s`, name, listener, host, pool, more)
}

// clientTLS is how clients of the site verify it.
func (w *world) clientTLS() *tls.Config {
	return &tls.Config{RootCAs: w.authority.Pool(), ServerName: siteName, MinVersion: tls.VersionTLS12}
}

// client speaks to the listener at address, whatever host a URL names.
func (w *world) client(t *testing.T, address string, http2 bool) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	config := w.clientTLS()
	config.ServerName = ""
	transport := &http.Transport{
		Protocols: protocols,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
		TLSClientConfig:     config,
		MaxIdleConnsPerHost: 128,
		DisableCompression:  true,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// failures collects the errors of concurrent requests: all are counted, the
// first ones are kept.
type failures struct {
	count atomic.Int64
	mu    sync.Mutex
	kept  []string
}

func (f *failures) add(err error) {
	if err == nil {
		return
	}
	f.count.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.kept) < 10 {
		f.kept = append(f.kept, time.Now().Format("15:04:05.000 ")+err.Error())
	}
}

func (f *failures) check(t *testing.T, requests int64) {
	t.Helper()
	if n := f.count.Load(); n > 0 {
		t.Errorf("%d of %d requests failed; the first ones:\n%s", n, requests, strings.Join(f.kept, "\n"))
	}
}

// get makes one request and checks its status and body.
func get(ctx context.Context, client *http.Client, url string, want []byte) error {
	return exchange(ctx, client, http.MethodGet, url, nil, want)
}

func exchange(ctx context.Context, client *http.Client, method, url string, body io.Reader, want []byte) error {
	request, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: after %d bytes: %w", method, url, len(got), err)
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("%s %s: %s: %.200q", method, url, response.Status, got)
	case !bytes.Equal(got, want):
		return fmt.Errorf("%s %s: %d bytes, not the %d that were expected", method, url, len(got), len(want))
	}
	return nil
}

// hammer makes n requests with 32 workers.
func hammer(ctx context.Context, n int, request func(ctx context.Context, i int) error) *failures {
	var failed failures
	var next atomic.Int64
	var workers sync.WaitGroup
	for range 32 {
		workers.Go(func() {
			for i := next.Add(1); i <= int64(n) && ctx.Err() == nil; i = next.Add(1) {
				failed.add(request(ctx, int(i)))
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		failed.add(ctx.Err())
	}
	return &failed
}

// settle calls check until it returns nil, for at most 10 s.
func settle(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Error(err)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
