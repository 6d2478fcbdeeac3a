// Package peers starts the TLS servers that stand behind edges in integration
// tests, benchmarks and demonstrations: Jetty, nginx, HAProxy, openssl s_server
// and Go. Each runs on a free port of 127.0.0.1 and tells what it saw itself:
// handshakes, connections and requests, counted at the backend.
package peers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// ServerName is the name in the certificate of every backend, besides localhost
// and 127.0.0.1 (but see Options.OneName).
const ServerName = "backend.test"

// ErrMode means that a backend can't run in the mode asked for.
var ErrMode = errors.New("mode not supported")

// Mode is how a backend lets clients resume.
type Mode int

// The modes.
const (
	// TLS13 is TLS 1.3 with pre-shared keys.
	TLS13 Mode = iota
	// TLS12Tickets is TLS 1.2 with tickets (RFC 5077).
	TLS12Tickets
	// TLS12SessionIDs is TLS 1.2 with session IDs alone (RFC 5246 section 7.3).
	TLS12SessionIDs
)

// String is the mode as it stands in names of tests.
func (m Mode) String() string {
	return [...]string{"tls1.3", "tls1.2-tickets", "tls1.2-session-ids"}[m]
}

// Version is the mode's TLS version.
func (m Mode) Version() uint16 {
	if m == TLS13 {
		return tls.VersionTLS13
	}
	return tls.VersionTLS12
}

// Options say how a backend is started.
type Options struct {
	// Authority issues the backend's certificate. Required.
	Authority *Authority
	// Dir is an empty directory for its files. Required.
	Dir string
	// Mode of resumption. Default: TLS13.
	Mode Mode
	// CloseEach makes the backend close the connection after each response.
	CloseEach bool
	// HTTP2 makes the backend agree to h2 by ALPN. Backends without HTTP/2
	// return ErrMode.
	HTTP2 bool
	// Strict makes Jetty drop the session of a connection that the client ended
	// without close_notify, as old Java did. Other backends ignore it.
	Strict bool
	// Address is where the backend listens: 127.0.0.1 with a port of FreePort, so
	// that it can be started again at the same place. Default: any free port. Go
	// ignores it.
	Address string
	// NoSessions makes nginx and openssl give out nothing to resume from. Other
	// backends return ErrMode.
	NoSessions bool
	// SessionTimeout is how long nginx lets sessions and tickets live, in whole
	// seconds. Default 1 h. Other backends ignore it.
	SessionTimeout time.Duration
	// Stateful makes Jetty keep TLS 1.3 sessions itself instead of in tickets, as
	// JSSE does with jdk.tls.server.enableSessionTicketExtension=false: it then
	// takes each ticket once. Other backends ignore it.
	Stateful bool
	// Bulk lets Java compile all the way, which starts slower but encrypts large
	// amounts several times faster. Other backends ignore it.
	Bulk bool
	// AnyVersion lets Jetty in mode TLS13 speak all versions that it has by default,
	// which are TLS 1.2 and 1.3. Other backends ignore it.
	AnyVersion bool
	// JavaHome is the Java that Java servers run on, one of Javas. Default: that of
	// PATH.
	JavaHome string
	// SingleUse makes Go take each TLS 1.3 ticket once and give a new one only with
	// a full handshake. Other backends ignore it.
	SingleUse bool
	// OneName leaves localhost and 127.0.0.1 out of the certificate. Jetty chooses
	// certificates by SNI, and so loses stateless sessions, with two names or more.
	OneName bool
	// Names are further names in the certificate.
	Names []string
}

// issue makes the backend's certificate.
func (o Options) issue() (Pair, error) {
	names := []string{ServerName}
	if !o.OneName {
		names = append(names, "localhost", "127.0.0.1")
	}
	return o.Authority.Issue(append(names, o.Names...)...)
}

// Counts are what a backend saw since its start. A field that the backend can't
// tell is Unknown.
type Counts struct {
	// Full handshakes: with a certificate and a signature.
	Full int64 `json:"full"`
	// Resumed handshakes by mechanism. A backend has one mode, so two of them
	// are 0.
	ResumedSessionID int64 `json:"resumedSessionId"`
	ResumedTicket    int64 `json:"resumedTicket"`
	ResumedPSK       int64 `json:"resumedPsk"`
	// Failed handshakes.
	Failed int64 `json:"failed"`
	// Connections accepted.
	Connections int64 `json:"connections"`
	// Requests whose header was read.
	Requests int64 `json:"requests"`
	// Unclean counts connections that the client ended, by FIN or RST, without
	// close_notify and before the backend sent its own.
	Unclean int64 `json:"unclean"`
	// Resets counts connections on which an RST arrived.
	Resets int64 `json:"resets"`
}

// Unknown is the value of a field of Counts that a backend can't tell.
const Unknown = -1

// Resumed is the sum over the mechanisms.
func (c Counts) Resumed() int64 { return c.ResumedSessionID + c.ResumedTicket + c.ResumedPSK }

// setResumed puts n into the field of the mode's mechanism.
func (c *Counts) setResumed(mode Mode, n int64) {
	switch mode {
	case TLS13:
		c.ResumedPSK = n
	case TLS12Tickets:
		c.ResumedTicket = n
	case TLS12SessionIDs:
		c.ResumedSessionID = n
	}
}

// Backend is a running server. Its methods may be called from any goroutine.
type Backend struct {
	// Name tells the program and the mode.
	Name string
	// Address is host:port of its TLS listener.
	Address string
	// Mode it was started in.
	Mode Mode

	paths  map[string]bool
	counts func(ctx context.Context) (Counts, error)
	output func() string
	stop   func() error
	// running is the backend's program, nil for one in this process.
	running *process.Process
}

// Serves reports whether the backend has a path of the content (see Paths).
func (b *Backend) Serves(path string) bool { return b.paths[path] }

// Counts asks the backend what it saw. What happened less than some 100 ms ago
// may be missing.
func (b *Backend) Counts(ctx context.Context) (Counts, error) { return b.counts(ctx) }

// Output is the newest part of what the backend printed, for failure messages.
func (b *Backend) Output() string { return b.output() }

// Signal sends a signal to the backend's program: SIGSTOP and SIGCONT to make it
// hang for a while, SIGKILL to end it without a word. Of nginx only the master
// gets it, which serves nobody. Go runs in this process and ignores it.
func (b *Backend) Signal(signal os.Signal) {
	if b.running != nil {
		b.running.Signal(signal)
	}
}

// Stop ends the backend and returns when all of it has ended.
func (b *Backend) Stop() error { return b.stop() }

// listenAddress is Options.Address or a free one.
func (o Options) listenAddress() (string, error) {
	if o.Address != "" {
		return o.Address, nil
	}
	return process.FreeAddress()
}

// has is the set of paths, for Backend.paths.
func has(paths ...string) map[string]bool {
	set := make(map[string]bool)
	for _, path := range paths {
		set[path] = true
	}
	return set
}

// writeFile writes a file of a backend's Dir and returns its path.
func writeFile(dir, name string, data []byte) (string, error) {
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, data, 0o644)
}

// started stops a process whose start failed halfway.
func started(p *process.Process, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w%s", err, suffix(p.Stop()))
}

func suffix(err error) string {
	if err == nil {
		return ""
	}
	return "; " + err.Error()
}
