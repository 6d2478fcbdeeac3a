package harness

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// SiteName is the name in the certificate that clients see, besides all names
// below it.
const SiteName = "site.test"

// Long reports whether the tests run at the size of the acceptance list instead
// of a part of it: RESEAL_LONG is set.
func Long() bool { return os.Getenv("RESEAL_LONG") != "" }

// Site is a fleet with what its manifests and clients need.
type Site struct {
	*Fleet
	// Authority issues the certificates of the site and its backends.
	Authority *peers.Authority
	// Pair is the site's certificate.
	Pair peers.Pair
}

// NewSite makes an authority and a certificate for a fleet.
func NewSite(fleet *Fleet) *Site {
	fleet.TB.Helper()
	s := &Site{Fleet: fleet}
	var err error
	if s.Authority, err = peers.NewAuthority("integration test"); err != nil {
		fleet.TB.Fatal(err)
	}
	s.Pair = s.Issue()
	return s
}

// Issue makes a further certificate for the site.
func (s *Site) Issue() peers.Pair {
	s.TB.Helper()
	pair, err := s.Authority.Issue(SiteName, "*."+SiteName)
	if err != nil {
		s.TB.Fatal(err)
	}
	return pair
}

// Launch starts a backend for the length of tb, or skips tb when its program is
// not installed.
func (s *Site) Launch(tb testing.TB, start func(context.Context, peers.Options) (*peers.Backend, error), o peers.Options) *peers.Backend {
	tb.Helper()
	o.Authority, o.Dir = s.Authority, tb.TempDir()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	backend, err := start(ctx, o)
	if errors.Is(err, process.ErrMissing) {
		tb.Skip(err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := backend.Stop(); err != nil {
			tb.Error(err)
		}
		if tb.Failed() {
			tb.Logf("%s printed:\n%s", backend.Name, backend.Output())
		}
	})
	return backend
}

// Indent puts PEM into a YAML block.
func Indent(text []byte, spaces int) string {
	pad := strings.Repeat(" ", spaces)
	return pad + strings.ReplaceAll(strings.TrimSpace(string(text)), "\n", "\n"+pad)
}

// Certificate is a manifest of a certificate.
func Certificate(name string, pair peers.Pair) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: Certificate
metadata: {name: %s}
spec:
  certificatePem: |
%s
  privateKeyPem: |
%s
`, name, Indent(pair.Certificate, 4), Indent(pair.Key, 4))
}

// Listener is a manifest of an https listener with the certificate "site". The
// selector holds labels as "k: v", empty for all edges. More is further lines of
// the spec, indented by two.
func Listener(name, address, selector, more string) string {
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

// Pool is a manifest of a pool whose endpoints are backends of the site's
// authority.
func (s *Site) Pool(name string, backends []*peers.Backend, more string) string {
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
%s`, name, endpoints.String(), peers.ServerName, Indent(s.Authority.PEM(), 8), more)
}

// Route is a manifest that sends a host of a listener to a pool.
func Route(name, listener, host, pool, more string) string {
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

// ClientTLS is how clients of the site verify it.
func (s *Site) ClientTLS() *tls.Config {
	return &tls.Config{RootCAs: s.Authority.Pool(), ServerName: SiteName, MinVersion: tls.VersionTLS12}
}

// Client speaks to the listener at address, whatever host a URL names.
func (s *Site) Client(tb testing.TB, address string, http2 bool) *http.Client {
	tb.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	config := s.ClientTLS()
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
	tb.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}
