package tickets

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

const (
	// visitTimeout bounds one connection.
	visitTimeout = time.Minute
	// retryPause is how long a client waits before it tries a refused connection
	// again.
	retryPause = 20 * time.Millisecond
)

var bothVersions = []uint16{tls.VersionTLS12, tls.VersionTLS13}

// counts is what clients saw of their handshakes.
type counts struct {
	first   atomic.Int64 // completed, no ticket was offered
	resumed atomic.Int64 // completed, a ticket was offered and taken
	missed  atomic.Int64 // completed, a ticket was offered and not taken
	broken  atomic.Int64 // connections that were refused or ended before the answer
}

func (c *counts) handshake(offered, resumed bool) {
	switch {
	case !offered:
		c.first.Add(1)
	case resumed:
		c.resumed.Add(1)
	default:
		c.missed.Add(1)
	}
}

func (c *counts) completed() int64 { return c.first.Load() + c.resumed.Load() + c.missed.Load() }

func (c *counts) String() string {
	return fmt.Sprintf("%d first, %d resumed, %d missed, %d broken", c.first.Load(), c.resumed.Load(), c.missed.Load(), c.broken.Load())
}

// client is a client in Go. It keeps the newest ticket that it got, even when a
// connection breaks. Only one goroutine may use it.
type client struct {
	config *tls.Config
	counts *counts
	// onTicket, if set, hears of the epoch of each ticket.
	onTicket func(epoch uint64)

	session *tls.ClientSessionState
	tickets int   // that it got
	failed  error // what is wrong with a ticket
}

// newClient makes a client that speaks one version of TLS and has no ticket.
func newClient(site *harness.Site, version uint16, counts *counts) *client {
	c := &client{config: site.ClientTLS(), counts: counts}
	c.config.MinVersion, c.config.MaxVersion = version, version
	c.config.ClientSessionCache = c
	c.config.NextProtos = []string{"http/1.1"}
	// The cheapest one: handshakes are what is counted, not measured.
	c.config.CurvePreferences = []tls.CurveID{tls.X25519}
	return c
}

// Get implements tls.ClientSessionCache.
func (c *client) Get(string) (*tls.ClientSessionState, bool) { return c.session, c.session != nil }

// Put implements tls.ClientSessionCache. crypto/tls forgets a session after a
// failed handshake; the end of a connection is no reason to.
func (c *client) Put(_ string, session *tls.ClientSessionState) {
	if session == nil {
		return
	}
	c.session = session
	c.tickets++
	if c.onTicket != nil {
		c.onTicket(c.epoch())
	}
}

// epoch is the number in the ticket that the client holds. It stands in the
// first 8 bytes, before what is sealed.
func (c *client) epoch() uint64 {
	ticket, _, err := c.session.ResumptionState()
	if err != nil || len(ticket) < 8 {
		c.failed = fmt.Errorf("a ticket of %d bytes: %w", len(ticket), err)
		return 0
	}
	return binary.BigEndian.Uint64(ticket)
}

// hold makes the client hold the same ticket as another.
func (c *client) hold(other *client) { c.session = other.session }

// visit connects, makes a handshake and a request, and reads the answer. It
// returns the state of the connection when the handshake was completed, even with
// an error.
func (c *client) visit(ctx context.Context, address string) (state *tls.ConnectionState, err error) {
	ctx, cancel := context.WithTimeout(ctx, visitTimeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = raw.Close() }()
	_ = raw.SetDeadline(time.Now().Add(visitTimeout))
	offered := c.session != nil
	conn := tls.Client(raw, c.config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	cs := conn.ConnectionState()
	c.counts.handshake(offered, cs.DidResume)
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", peers.Small, harness.SiteName); err != nil {
		return &cs, err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return &cs, err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return &cs, err
	case response.StatusCode != http.StatusOK || !bytes.Equal(body, peers.Body(peers.Small)):
		return &cs, fmt.Errorf("%s with %d bytes: %.200q", response.Status, len(body), body)
	}
	return &cs, c.failed
}

// persist is visit, again when the connection was refused or broke, as when an
// edge restarts.
func (c *client) persist(ctx context.Context, address string) (*tls.ConnectionState, error) {
	for deadline := time.Now().Add(patience); ; {
		state, err := c.visit(ctx, address)
		if err == nil || !brokenConnection(err) {
			return state, err
		}
		c.counts.broken.Add(1)
		if time.Now().After(deadline) {
			return state, err
		}
		select {
		case <-ctx.Done():
			return state, err
		case <-time.After(retryPause):
		}
	}
}

// brokenConnection reports that the other side is gone, rather than that it has
// said something.
func brokenConnection(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNREFUSED)
}
