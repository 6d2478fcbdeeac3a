// Package frontend serves the leg between clients and the edge: listeners, TLS,
// HTTP/1.1 and HTTP/2, and TLS without HTTP.
//
// The handshake of a connection is made by a goroutine. Then the connection is one
// loop's (edge/loop), and with it all its requests: nothing of them needs a lock.
//
// Configuration is swapped without dropping a connection. Two things have a life of
// their own: a socket belongs to an address, a slot to a listener's name. An apply
// moves sockets between slots and gives slots a new state, which the next handshake
// and the next request use.
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
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ReasonHeader is set on answers that the edge makes itself and holds the
// reason, the same word as in the access log.
const ReasonHeader = "Reseal-Reason"

// Config is what a Frontend needs. It is read once, by New.
type Config struct {
	// Loops are what connections are served on once their handshake is complete.
	// Somebody runs them, for longer than the Frontend. Required.
	Loops *loop.Group
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
	// Inherited, unless nil, returns a listening socket that this process was given for
	// an address, as by the process that it takes the place of, or nil: the address is
	// bound then. The key names it among those of Sockets of the process that it was.
	Inherited func(key, address string) (*net.TCPListener, error)
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// AccessLog gets one record per request, or per connection for protocol tls: a
	// line of JSON by one Write, which must not block, nor keep the line. Nil: none.
	AccessLog io.Writer
	// Failed is told of each request that was answered with 5xx or ended early, other
	// than by its client's doing. It is called on the loops and must not block. Nil:
	// nobody is told.
	Failed func(*resealv1.Failure)
	// Observer sees requests that are over. Nil: nobody does.
	Observer Observer
}

// Observer sees what becomes of requests. It is called on the loops and must not block.
type Observer interface {
	// Watching tells whether anybody wants to see requests now. It is asked for each,
	// and nearly always says no: it must cost next to nothing.
	Watching() bool
	// See sees a request that is over. It must not keep o, nor its texts.
	See(o *exchange.Outcome)
}

// Upstream is the leg behind the frontend. Its methods are called on l, the loop of
// the client's connection, and don't block. They are never nil, and call nothing of
// front before they return. x and r belong to the leg until the exchange is over
// (exchange.Flow); it reports on x even when it fails.
type Upstream interface {
	// Start sends r to x.Pool. Where its body goes on, and the answer's, is told
	// through the Flow that it returns. A request for a protocol (r.Protocol) is one
	// of HTTP/1: the answer that agrees to it is 101.
	Start(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow
	// Tunnel connects to x.Pool for bytes. Once it is open, front is told by a
	// Response with the status 101.
	Tunnel(l *loop.Loop, x *exchange.Exchange, front exchange.Front) exchange.Flow
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
	lanes    map[*loop.Loop]*lane
	clients  atomic.Uint64 // numbers client connections
	open     atomic.Int64  // connections of clients
	draining atomic.Bool
	serving  chan struct{} // closed when connections are accepted

	work sync.WaitGroup // all goroutines
	crew *crew          // makes handshakes

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
	f := &Frontend{
		cfg:     cfg,
		tickets: newTickets(),
		memory:  &memory{limit: cfg.MemoryLimit, used: cfg.MemoryUsed},
		slots:   map[string]*slot{},
		sockets: map[string]*socket{},
		lanes:   map[*loop.Loop]*lane{},
		serving: make(chan struct{}),
	}
	f.crew = newCrew(&f.work)
	for _, l := range cfg.Loops.Loops() {
		f.lanes[l] = &lane{loop: l}
	}
	return f
}

// nextLane is where a connection that is new to the loops goes.
func (f *Frontend) nextLane() *lane { return f.lanes[f.cfg.Loops.Next()] }

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
	close(f.serving)

	<-ctx.Done()

	f.mu.Lock()
	f.phase = stopped
	f.draining.Store(true)
	for _, socket := range f.sockets {
		socket.close()
	}
	for key, socket := range f.sockets {
		<-socket.ended // what it has accepted is served, too
		delete(f.sockets, key)
	}
	for name, slot := range f.slots {
		slot.end()
		delete(f.slots, name)
	}
	f.mu.Unlock()
	close(f.crew.over)
	f.work.Wait()
	return nil
}

// spawn runs f on a goroutine that Run waits for. What a change leaves to be done
// goes there: a panic of it costs no more than that.
func (f *Frontend) spawn(what string, do func()) {
	f.work.Go(func() {
		defer func() {
			if bug := recover(); bug != nil {
				f.cfg.Logger.Error("panic: this is a bug", "during", what, "panic", fmt.Sprint(bug), "stack", string(debug.Stack()))
			}
		}()
		do()
	})
}

// start begins to accept on a socket. f.mu is held.
func (f *Frontend) start(s *socket) {
	f.work.Go(func() { s.accept(f.cfg.Logger) })
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
	if !drain {
		return // those who were asked to leave are on their way out already
	}
	for _, slot := range f.slots {
		bound := timeout
		if bound <= 0 {
			bound = slot.drainTimeout()
		}
		slot.drain(bound)
	}
}

// Serving is closed when Run has begun to accept connections.
func (f *Frontend) Serving() <-chan struct{} { return f.serving }

// Connections counts those of clients that are open, also of listeners that are gone.
func (f *Frontend) Connections() int { return int(f.open.Load()) }

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
