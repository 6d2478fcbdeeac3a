package backend

import (
	"slices"
	"time"
)

// A client that takes nothing of its answers, or sends nothing of its bodies, pins
// the HTTP/1 connections that they are on. While there is room that hurts nobody. When a request finds none,
// connections are shared out evenly: a client connection that holds more than
// maxPerEndpoint divided by the client connections that hold or want some gives
// one back that has waited for its client for stalledAfter, and its own requests
// wait behind those of others. A full queue is shared out
// likewise. HTTP/2 needs none of it: there a client pins streams, of which
// connections have many, and at most exchange.AnswerWindow of memory with each.

// stalledAfter is how long a connection waits for its client before it may be
// given to others.
const stalledAfter = time.Second

// reclaimPause is how long nobody looks again for a connection to take from its client
// when there was none: the look costs as much as there are clients and waiters, and
// each request that finds an endpoint full has one made.
const reclaimPause = 20 * time.Millisecond

// share is what one client connection holds and wants of an endpoint.
type share struct {
	client  uint64
	held    []*soloConn
	waiting int
}

func (e *endpoint) shareOf(client uint64) *share {
	s := e.clients[client]
	if s == nil {
		if s = e.spare; s == nil {
			s = &share{}
		}
		e.spare, s.client = nil, client
		e.clients[client] = s
	}
	return s
}

func (e *endpoint) tidyShare(s *share) {
	if len(s.held) == 0 && s.waiting == 0 {
		delete(e.clients, s.client)
		e.spare = s
	}
}

// enter counts a waiter. e.mu is held, as for all that follows.
func (e *endpoint) enter(w *waiter) {
	e.waiting++
	e.shareOf(w.call.Client).waiting++
}

// exit counts a waiter that was served, or gave up.
func (e *endpoint) exit(w *waiter) {
	e.waiting--
	s := e.shareOf(w.call.Client)
	s.waiting--
	e.tidyShare(s)
}

// hold notes that a client's request is on c, unhold that it no longer is, which
// the end of c sees to.
func (e *endpoint) hold(c *soloConn, client uint64) {
	e.unhold(c)
	if c.Closing() {
		return
	}
	s := e.shareOf(client)
	s.held = append(s.held, c)
	c.holder = s
}

func (e *endpoint) unhold(c *soloConn) {
	s := c.holder
	if s == nil {
		return
	}
	c.holder = nil
	if i := slices.Index(s.held, c); i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
	e.tidyShare(s)
}

// evenShare is how many connections each client connection may count on.
func (e *endpoint) evenShare(settings *settings) int {
	return max(settings.maxOpen/max(len(e.clients), 1), 1)
}

// modest reports whether a waiter's client holds less than its share.
func (e *endpoint) modest(w *waiter, settings *settings) bool {
	return len(e.shareOf(w.call.Client).held) < e.evenShare(settings)
}

// next returns the index of the waiter whose turn it is among those that may be
// served: the longest waiting of a modest client, or else the longest waiting. It is
// -1 if there is none.
func (e *endpoint) next(set *connSet, settings *settings, may func(*waiter) bool) int {
	first := -1
	for i, w := range set.waiters {
		if !may(w) {
			continue
		}
		if e.modest(w, settings) {
			return i
		}
		if first < 0 {
			first = i
		}
	}
	return first
}

// reclaim ends exchanges that wait for their clients, as many as modest clients
// wait for in set.
func (e *endpoint) reclaim(set *connSet, settings *settings) {
	now := time.Now()
	if now.Before(e.noReclaim) {
		return
	}
	wanted := -e.reclaimed
	for _, w := range set.waiters {
		if !w.raw && e.modest(w, settings) {
			wanted++
		}
	}
	for ; wanted > 0; wanted-- {
		c, waits := e.leastTaken(settings)
		if c == nil {
			e.noReclaim = now.Add(reclaimPause)
			return
		}
		e.unhold(c)
		c.reclaimed = true
		e.reclaimed++
		c.Do(func() { c.reclaim(waits) })
	}
}

// reclaim ends the exchange of a connection that has waited for its client since
// then, unless it goes on meanwhile.
func (c *soloConn) reclaim(waits int64) {
	if c.waits.Load() == waits {
		c.fail(fail(ReasonClientShare, errClientShare).blamed(blameEdge))
		return
	}
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	if c.Closing() {
		return // it will be free all the same
	}
	c.reclaimed = false
	c.e.reclaimed--
	if c.front != nil {
		c.e.hold(c, c.owner.client)
	}
}

// leastTaken finds the connection that has waited longest for the client connection
// that holds the most, of those that hold more than their share, and since when.
func (e *endpoint) leastTaken(settings *settings) (found *soloConn, waits int64) {
	most, even := 0, e.evenShare(settings)
	latest := time.Now().Add(-stalledAfter).UnixNano()
	for _, s := range e.clients {
		if len(s.held) <= max(most, even) {
			continue
		}
		longest := latest
		for _, c := range s.held {
			if since := c.waits.Load(); since != 0 && since < longest {
				found, waits, longest, most = c, since, since, len(s.held)
			}
		}
	}
	return found, waits
}

// displace makes room in a full queue by refusing the newest request of the
// client connection with the most in it, if that has more than w's.
func (e *endpoint) displace(w *waiter) bool {
	own := 0
	if s := e.clients[w.call.Client]; s != nil {
		own = s.waiting
	}
	var greedy uint64
	most := own + 1
	for client, s := range e.clients {
		if s.waiting > most {
			greedy, most = client, s.waiting
		}
	}
	if most == own+1 {
		return false
	}
	var from *connSet
	var newest *waiter
	for _, set := range e.sets {
		for _, other := range set.waiters {
			if other.call.Client == greedy && (newest == nil || other.since.After(newest.since)) {
				from, newest = set, other
			}
		}
	}
	if newest == nil {
		return false
	}
	from.waiters = slices.Delete(from.waiters, slices.Index(from.waiters, newest), slices.Index(from.waiters, newest)+1)
	e.exit(newest)
	newest.tell(grant{err: fail(ReasonClientShare, errQueueShare)})
	return true
}
