// Package frontend serves the leg between clients and the edge: listeners, TLS,
// HTTP/1.1 and HTTP/2, and TLS without HTTP.
//
// Configuration is swapped without dropping a connection. Three things have a
// life of their own: a socket belongs to an address, a slot to a listener's
// name, and a generation to the server settings that new connections get. An
// apply moves sockets between slots, gives slots a new state, which the next
// handshake and the next request use, and starts a new generation only when
// settings changed that a running server can't change.
//
// Reasons in the access log, besides those of the upstream:
//
//   - refused here: no_route, misdirected, method_not_allowed, header_too_large,
//     too_many_fields, client_certificate, bad_host, bad_target, bad_request, memory_limit;
//     plain_http, proxy_protocol and http2_flood are not requests and only
//     counted or answered;
//   - ended by the client: client_abort, client_stalled, both with status 499;
//   - ended by a bound: timeout_body, timeout_request, timeout_idle, drain_timeout;
//   - failed behind: protocol_error, reset, upstream_error; internal is a bug.
package frontend

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ReasonHeader is set on answers that the edge makes itself and holds the
// reason, the same word as in the access log.
const ReasonHeader = "Reseal-Reason"

// Config is what a Frontend needs. It is read once, by New.
type Config struct {
	// Upstream takes requests on. Required.
	Upstream Upstream
	// Counters returns the counters of a listener. Required.
	Counters func(listener string) Counters
	// TicketKeys returns what seals the tickets of a listener under a policy: the
	// same for the same arguments, which are those of exchange.Listener, on every edge of
	// the fleet. It must not block. Nil: each listener has keys that are made and
	// rotated by crypto/tls, here alone.
	TicketKeys func(keyring, listener, policyKey string) TicketKeys
	// MemoryLimit is what the process may use, in bytes. As what connections and
	// requests are reckoned to hold comes near it, new connections are refused, and
	// then new requests, with 503. 0: no limit.
	MemoryLimit int64
	// MemoryUsed, if set, is what the process is measured to use. New connections
	// and requests are refused when that comes near the limit, too. It must not
	// block.
	MemoryUsed func() int64
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// AccessLog gets one record per request, or per connection for protocol
	// tls. Nil: none.
	AccessLog *slog.Logger
}

// Upstream is the leg behind the frontend.
type Upstream interface {
	// RoundTrip sends req to x.Pool and returns the response as soon as its
	// header is there; the body of req may still be read then, until the body of
	// the response is closed. It reports on x even when it fails. It calls the
	// Got1xxResponse hook of the httptrace in req's context. The body of a 101
	// response is an io.ReadWriteCloser, with CloseWrite if it can half-close.
	//
	// An error with a method HTTPStatus() (code int, reason string) decides what
	// the client is told; any other is 502 upstream_error. The same goes for
	// errors of the response's body, for the log.
	RoundTrip(req *http.Request, x *exchange.Exchange) (*http.Response, error)
	// Tunnel connects to x.Pool for bytes. Errors are as for RoundTrip.
	Tunnel(ctx context.Context, x *exchange.Exchange) (exchange.Tunnel, error)
}

// Counters count what happens on one listener. They are safe for concurrent
// use.
type Counters interface {
	exchange.Counters
	// Ticket counts a completed handshake for which a ticket of a keyring was
	// offered, by the epoch that it names (0: none that can be). A zero miss
	// means that it was resumed.
	Ticket(keyring string, epoch uint64, miss resealv1.MissReason)
}

// Frontend serves listeners.
type Frontend struct {
	cfg      Config
	tickets  *tickets
	memory   *memory
	clients  atomic.Uint64 // numbers client connections
	draining atomic.Bool

	// work are all goroutines that are not of an http.Server.
	work sync.WaitGroup

	mu      sync.Mutex
	phase   phase
	slots   map[string]*slot   // by listener
	sockets map[string]*socket // by socketKey
}

// phase is where Run stands.
type phase int

const (
	notStarted phase = iota
	running
	stopped
)

// New makes a Frontend that serves nothing before Run. Configuration may be
// applied before.
func New(cfg Config) *Frontend {
	return &Frontend{
		cfg:     cfg,
		tickets: newTickets(),
		memory:  &memory{limit: cfg.MemoryLimit, used: cfg.MemoryUsed},
		slots:   map[string]*slot{},
		sockets: map[string]*socket{},
	}
}

// Run serves until ctx ends. Then it closes all sockets, lets each listener
// drain up to its timeouts.drain, and returns when everything has ended. It
// returns nil. A Frontend can't run again.
func (f *Frontend) Run(ctx context.Context) error {
	f.mu.Lock()
	f.phase = running
	for _, socket := range f.sockets {
		f.start(socket)
	}
	f.mu.Unlock()

	<-ctx.Done()

	f.mu.Lock()
	f.phase = stopped
	f.draining.Store(true)
	for key, socket := range f.sockets {
		socket.close()
		delete(f.sockets, key)
	}
	for name, slot := range f.slots {
		f.remove(slot)
		delete(f.slots, name)
	}
	f.mu.Unlock()
	f.work.Wait()
	return nil
}

// start begins to accept on a socket. f.mu is held.
func (f *Frontend) start(s *socket) {
	f.work.Go(func() { s.accept(f.cfg.Logger) })
}

// remove ends a slot: new connections are closed, the others drain. f.mu is
// held.
func (f *Frontend) remove(s *slot) {
	for _, old := range s.end() {
		f.drain(old, s.drainTimeout())
	}
}

// drain drains a generation in the background.
func (f *Frontend) drain(g *generation, timeout time.Duration) {
	f.work.Go(func() { g.drain(timeout) })
}

// Drain asks all clients to leave: responses say "Connection: close", HTTP/2
// connections get GOAWAY, and after timeout (0: each listener's timeouts.drain)
// connections that were open at the call are closed. Clients that come
// nevertheless are served, one request per connection; a further Drain bounds
// those, too. Drain(false, 0) undoes it. It does not wait.
func (f *Frontend) Drain(drain bool, timeout time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.phase == stopped || !f.draining.Swap(drain) && !drain {
		return
	}
	for _, slot := range f.slots {
		if !drain {
			slot.renew().retire() // its clients are on their way out already
			continue
		}
		bound := timeout
		if bound <= 0 {
			bound = slot.drainTimeout()
		}
		for _, old := range slot.renewAll() {
			f.drain(old, bound)
		}
	}
}

// Draining reports whether Drain is in force or Run is ending.
func (f *Frontend) Draining() bool { return f.draining.Load() }

// Addr is the address on which a listener accepts, or nil without such a
// listener. It tells the port when the configured one is 0.
func (f *Frontend) Addr(listener string) net.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	slot := f.slots[listener]
	if slot == nil {
		return nil
	}
	if socket := f.sockets[slot.state.Load().socketKey()]; socket != nil {
		return socket.listener.Addr()
	}
	return nil
}
