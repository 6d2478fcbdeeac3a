package session

import (
	"crypto/tls"
	"sync"
	"sync/atomic"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// connCache is the tls.ClientSessionCache of one connection: Get hands out the
// one session that was taken for it, Put files what the server gives.
type connCache struct {
	store    *Store
	identity exchange.Identity
	offer    offer
	spy      *helloSpy

	supply *supply
	// refusal is why a session that can be offered by ID must not be.
	refusal resealv1.MissReason
	// unclean is the identity's count of unclean closes when the handshake
	// completed. Guarded by Store.mu.
	unclean uint64
	// parent is the session that the handshake resumed, renewed whether the
	// server declined one. Guarded by Store.mu.
	parent  *held
	renewed bool
	turned  bool // its ticket's turn has been measured
	bare    bool // no ticket was asked for

	mu        sync.Mutex
	handedOut bool
	dropped   bool // crypto/tls deleted what it got
	empty     bool // the server gave an empty ticket
	completed bool
	early     []*tls.ClientSessionState // given before the handshake completed
}

// maxOffered bounds a ticket that can be offered, in bytes: with all else that a
// ClientHello holds it must fit into extensions of 64 KiB (RFC 8446 section 4.1.2).
const maxOffered = 60 << 10

// supply is whether a connection's server has given a session.
type supply struct {
	given atomic.Bool // at least one session came
	read  atomic.Bool // all that may bring one has been processed, as Store.shake and helloSpy say
}

// withheld reports that the server had its chance to give a session and did
// not. In TLS 1.3 tickets arrive with what is read after the handshake; in TLS
// 1.2 it is over when the session is filed under its ID.
func (s *supply) withheld() bool { return !s.given.Load() && s.read.Load() }

// Get implements tls.ClientSessionCache.
func (c *connCache) Get(string) (*tls.ClientSessionState, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.offer.session == nil || c.handedOut || c.refusal != 0 {
		return nil, false
	}
	c.handedOut = true
	return c.offer.session.state, true
}

// Put implements tls.ClientSessionCache. crypto/tls calls it with nil to delete
// a session that it will not offer, or whose handshake failed.
func (c *connCache) Put(_ string, state *tls.ClientSessionState) {
	c.mu.Lock()
	if state == nil {
		c.dropped = true
		c.mu.Unlock()
		return
	}
	ticket, _, err := state.ResumptionState()
	if len(ticket) > maxOffered {
		// As good as none. That the server gives such tickets is known with the next
		// read, as if it had given none.
		c.mu.Unlock()
		return
	}
	if err != nil || len(ticket) == 0 {
		// A server may send an empty ticket to say that it gives none (RFC 5077
		// section 3.3), as JSSE does; the session may have an ID all the same.
		c.empty = true
		c.mu.Unlock()
		return
	}
	c.supply.given.Store(true)
	if !c.completed {
		// A ticket of TLS 1.2 comes before the server's Finished is verified.
		c.early = append(c.early, state)
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	c.store.file(c, state)
	c.offer.pending.settle()
}

// complete files the sessions that came with the handshake.
func (c *connCache) complete(resumed bool) {
	c.store.connected(c, resumed)
	c.mu.Lock()
	early := c.early
	c.early, c.completed = nil, true
	c.mu.Unlock()
	for _, state := range early {
		c.store.file(c, state)
	}
}

func (c *connCache) handed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.handedOut
}

func (c *connCache) gotEmpty() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.empty
}

func (c *connCache) wasDropped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dropped
}
