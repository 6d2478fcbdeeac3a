// Package probe finds out, with a bounded number of polite handshakes, what a TLS
// backend can do: how it resumes sessions, what they live through, whether its
// addresses share them, and how it keeps connections. It says what follows for
// a pool's manifest.
package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Report is what a probe found out.
type Report = resealv1.ProbeReport

// Handshaker makes client handshakes and resumes sessions of an identity as
// edges do.
type Handshaker interface {
	// Handshake offers a session of identity when there is one and keeps those
	// that the server gives. A completed handshake has either a mechanism or a
	// miss reason.
	Handshake(ctx context.Context, conn net.Conn, identity exchange.Identity, cfg *tls.Config) (
		exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error)
}

const (
	defaultMaxConnections = 40
	defaultPause          = 20 * time.Millisecond
	defaultTimeout        = 5 * time.Second
	defaultCloseTimeout   = time.Second
	// maxAddresses bounds the addresses of a name that are compared.
	maxAddresses = 8
)

// Config says what to probe. It is read once, by New.
type Config struct {
	// Address is host:port. All addresses of a host name are probed, the first
	// that answers in depth. Required.
	Address string
	// ServerName is the name in SNI, verified in the certificate, and the
	// requests' Host. Default: the address's host.
	ServerName string
	// Roots are the trusted roots. Default: the system's.
	Roots *x509.CertPool
	// Certificates are presented when the backend asks for one.
	Certificates []tls.Certificate
	// InsecureSkipVerify accepts any certificate.
	InsecureSkipVerify bool
	// Policy bounds versions, cipher suites and curves. Default: TLS 1.2 to 1.3
	// with Go's ciphers.
	Policy *resealv1.TLSPolicy
	// TLS, if set, takes the place of Roots, Certificates, InsecureSkipVerify
	// and Policy: the client configuration of a pool. It is cloned.
	TLS *tls.Config
	// Sessions returns a Handshaker without sessions, which makes the TLS 1.2
	// handshakes. Nil: sessions by ID are not tried.
	Sessions func() Handshaker
	// Path is what is requested. Default "/".
	Path string
	// NoRequests sends no HTTP requests.
	NoRequests bool
	// Idle is how long a session and a connection are left idle to see whether they
	// survive. 0: not tried.
	Idle time.Duration
	// MaxConnections bounds the connections made. Default 40.
	MaxConnections int
	// Pause is the time between two connections. Default 20ms.
	Pause time.Duration
	// Timeout bounds each dial, handshake and request. Default 5s.
	Timeout time.Duration
	// CloseTimeout bounds the wait for the backend's end of a connection.
	// Default 1s.
	CloseTimeout time.Duration
	// Dial connects to an address, ip:port. Default: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolve looks up a host's addresses. Default: the system's resolver.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Probe probes one backend.
type Probe struct {
	cfg  Config
	base *tls.Config // versions, ciphers, verification; cloned for each handshake
}

// New checks cfg and connects to nothing.
func New(cfg Config) (*Probe, error) {
	host, port, err := net.SplitHostPort(cfg.Address)
	if number, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || host == "" || number == 0 {
		return nil, fmt.Errorf("address %q is not host:port", cfg.Address)
	}
	if cfg.ServerName == "" {
		cfg.ServerName = strings.ToLower(strings.TrimSuffix(host, "."))
	}
	if cfg.Path == "" {
		cfg.Path = "/"
	}
	if !strings.HasPrefix(cfg.Path, "/") || strings.ContainsFunc(cfg.Path, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return nil, fmt.Errorf("path %q does not begin with / or holds characters that a request line can't hold", cfg.Path)
	}
	if strings.ContainsFunc(cfg.ServerName, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '/' }) {
		return nil, fmt.Errorf("server name %q holds characters that a name can't hold", cfg.ServerName)
	}
	if cfg.Idle < 0 {
		return nil, errors.New("the idle time can't be negative")
	}
	setDefaults(&cfg)
	base, err := baseTLS(cfg)
	if err != nil {
		return nil, err
	}
	return &Probe{cfg: cfg, base: base}, nil
}

func setDefaults(cfg *Config) {
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = defaultMaxConnections
	}
	if cfg.Pause <= 0 {
		cfg.Pause = defaultPause
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.CloseTimeout <= 0 {
		cfg.CloseTimeout = defaultCloseTimeout
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
}

// run is one run of a probe. One goroutine uses it.
type run struct {
	cfg     Config
	base    *tls.Config
	report  *Report
	started time.Time
	targets []*target
	alpn    []string // offered by connections that may carry requests
	http    bool     // requests are sent
	closes  bool     // the backend closes after each answer
	chains  []*chain // one per version that was tried
	lines   int      // identities used so far
	slowest time.Duration
}

// target is an address of the backend.
type target struct {
	address string
	facts   *resealv1.ProbeAddress
}

// errEnough ends a run early; what was found out until then counts.
var errEnough = errors.New("enough connections")

// Run probes until all is known, the bound on connections is reached or ctx's
// deadline passes; what could not be tried then stands in the report's notes.
// It returns an error when no handshake was completed or ctx is cancelled.
func (p *Probe) Run(ctx context.Context) (*Report, error) {
	r := &run{cfg: p.cfg, base: p.base, started: time.Now(), http: !p.cfg.NoRequests}
	r.report = &Report{
		Address:    p.cfg.Address,
		StartedAt:  timestamppb.New(r.started),
		KeepAlive:  &resealv1.ProbeKeepAlive{},
		ServerName: serverNameSent(p.cfg.ServerName),
	}
	if err := r.resolve(ctx); err != nil {
		return nil, err
	}
	if err := r.discover(ctx); err != nil {
		return nil, err
	}
	err := r.explore(ctx)
	switch {
	case err == nil:
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, ctx.Err()
	case errors.Is(err, errEnough):
		r.note("stopped after %d connections, so not everything was tried", r.cfg.MaxConnections)
	case ctx.Err() != nil:
		r.note("stopped after %s, so not everything was tried", time.Since(r.started).Round(time.Second))
	default:
		r.note("stopped early: %v", err)
	}
	r.report.Took = durationpb.New(time.Since(r.started).Round(time.Millisecond))
	r.advise()
	return r.report, nil
}

// serverNameSent is the name that goes into SNI, which takes no IP addresses.
func serverNameSent(name string) string {
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	return name
}

func (r *run) note(format string, args ...any) {
	r.report.Notes = append(r.report.Notes, fmt.Sprintf(format, args...))
}

func (r *run) resolve(ctx context.Context) error {
	host, port, _ := net.SplitHostPort(r.cfg.Address) // New has checked it
	var addresses []netip.Addr
	if address, err := netip.ParseAddr(host); err == nil {
		addresses = []netip.Addr{address}
	} else {
		bounded, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
		defer cancel()
		if addresses, err = r.cfg.Resolve(bounded, host); err != nil {
			return fmt.Errorf("look up %s: %w", host, err)
		}
	}
	seen := map[string]bool{}
	for _, address := range addresses {
		text := net.JoinHostPort(address.Unmap().String(), port)
		if seen[text] {
			continue
		}
		if len(seen) == maxAddresses {
			r.note("%s has more addresses: only the first %d were looked at", host, maxAddresses)
			break
		}
		seen[text] = true
		facts := &resealv1.ProbeAddress{Address: text}
		r.targets = append(r.targets, &target{address: text, facts: facts})
		r.report.Addresses = append(r.report.Addresses, facts)
	}
	if len(r.targets) == 0 {
		return fmt.Errorf("look up %s: no addresses", host)
	}
	return nil
}

// explore finds out everything once the backend is known to answer.
func (r *run) explore(ctx context.Context) error {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if version < r.base.MinVersion || version > r.base.MaxVersion {
			continue
		}
		if err := r.probeVersion(ctx, version); err != nil {
			return err
		}
	}
	if err := r.compareAddresses(ctx); err != nil {
		return err
	}
	return r.probeIdle(ctx)
}
