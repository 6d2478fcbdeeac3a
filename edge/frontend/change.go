package frontend

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Change is a prepared set of listeners. Exactly one of Commit and Abort must be
// called, before the next Prepare, and Abort also when Commit panics.
type Change struct {
	frontend *Frontend
	next     []*state
	bound    map[string]*socket // new ones, by socketKey
}

// Prepare checks listeners, which replace all current ones, and binds the
// addresses that are new. Nothing is served differently before Commit. When it
// finds violations there is no Change and nothing stays bound.
func (f *Frontend) Prepare(listeners []exchange.Listener) (*Change, []*resealv1.Violation) {
	change := &Change{frontend: f, bound: map[string]*socket{}}
	var violations []*resealv1.Violation
	refuse := func(listener exchange.Listener, field, format string, args ...any) {
		violations = append(violations, &resealv1.Violation{
			Resource: &resealv1.ResourceRef{Kind: "Listener", Name: listener.Name},
			Field:    field, Description: fmt.Sprintf(format, args...),
		})
	}
	var overlapping []*state
	names, ports := map[string]bool{}, map[string][]*state{}
	for _, listener := range listeners {
		next := newState(listener, func(field, format string, args ...any) { refuse(listener, field, format, args...) })
		port := keyPort(next.socketKey())
		switch other := rival(next, ports[port]); {
		case names[listener.Name]:
			refuse(listener, "metadata.name", "there are two listeners with this name")
		case other != nil:
			refuse(listener, "spec.address", "address already in use by Listener/%s", other.Name)
		case f.overlaps(next.socketKey()):
			overlapping = append(overlapping, next)
		default:
			if err := change.bind(next); err != nil {
				refuse(listener, "spec.address", "%s", bindProblem(err))
			}
		}
		names[listener.Name], ports[port] = true, append(ports[port], next)
		change.next = append(change.next, next)
	}
	// These take over clients of a socket in use, so they must not be bound in vain.
	for _, next := range overlapping {
		if len(violations) > 0 {
			break
		}
		if err := change.bindBeside(next); err != nil {
			refuse(next.Listener, "spec.address", "%s", bindProblem(err))
		}
	}
	if len(violations) > 0 {
		change.Abort()
		return nil, violations
	}
	return change, nil
}

// rival is one of others that has the address of next or one that overlaps.
func rival(next *state, others []*state) *state {
	for _, other := range others {
		if other.socketKey() == next.socketKey() || overlap(other.socketKey(), next.socketKey()) {
			return other
		}
	}
	return nil
}

// bind binds an address unless there is a socket for it.
func (c *Change) bind(next *state) error {
	key := next.socketKey()
	if c.frontend.socket(key) != nil {
		return nil
	}
	listener, err := c.frontend.inherited(key, next.Spec.GetAddress())
	if listener == nil && err == nil {
		listener, err = listen(next.Spec.GetAddress(), false)
	}
	if err != nil {
		return err
	}
	c.bound[key] = newSocket(listener)
	return nil
}

// bindProblem says why an address can't be bound and what to do.
func bindProblem(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return "address already in use by another process, or an overlapping one is"
	case errors.Is(err, syscall.EACCES):
		return "this edge may not bind the address: ports below 1024 need CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return "no interface of this edge has the address"
	default:
		return "the address can't be bound: " + err.Error()
	}
}

// Abort gives up what Prepare bound. After a Commit that panicked, that is what it
// had not put into service.
func (c *Change) Abort() {
	c.frontend.mu.Lock()
	defer c.frontend.mu.Unlock()
	c.abort()
}

// abort is Abort; f.mu is held.
func (c *Change) abort() {
	for key, socket := range c.bound {
		if c.frontend.sockets[key] != socket {
			socket.close()
		}
	}
}

// Commit serves the prepared listeners from now on. It does not fail and does
// not wait; listeners that are gone drain in the background.
func (c *Change) Commit() {
	f := c.frontend
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.phase == stopped {
		c.abort()
		return
	}
	// What others do for it comes first, while nothing has changed.
	fresh := map[string]*slot{}
	for _, next := range c.next {
		next.tickets = f.ticketPolicy(&next.Listener)
		if f.slots[next.Name] == nil {
			fresh[next.Name] = newSlot(f, next.Name)
		}
	}
	named, addressed := map[string]bool{}, map[string]bool{}
	moved := map[*slot]bool{}
	for _, next := range c.next {
		named[next.Name] = true
		addressed[next.socketKey()] = true
		slot := f.slots[next.Name]
		if slot == nil {
			slot = fresh[next.Name]
			f.slots[next.Name] = slot
		}
		slot.update(next)
		c.give(next.socketKey(), slot, moved)
	}
	for key, socket := range f.sockets {
		if !addressed[key] && !c.keep(key, socket, moved) {
			moved[socket.owner.Load()] = true
			socket.close()
			delete(f.sockets, key)
		}
	}
	for name, slot := range f.slots {
		if !named[name] {
			slot.end()
			delete(f.slots, name)
			f.tickets.forget(name)
		} else if moved[slot] {
			slot.drain(slot.drainTimeout())
		}
	}
}

// give makes slot the owner of a socket. The slot that loses it goes into moved,
// since its connections came in on an address that is no longer its own.
// f.mu is held.
func (c *Change) give(key string, slot *slot, moved map[*slot]bool) {
	f := c.frontend
	socket := f.sockets[key]
	if socket == nil {
		socket = c.bound[key]
		f.sockets[key] = socket
		socket.owner.Store(slot)
		if f.phase == running {
			f.start(socket)
		}
		return
	}
	if old := socket.owner.Swap(slot); old != slot {
		moved[old] = true
		socket.wake()
	}
}

// state is what a listener's new handshakes and requests use. It is immutable
// once it is committed.
type state struct {
	exchange.Listener
	settings settings
	proxies  []netip.Prefix // must send a PROXY header
	claims   claims
	tickets  *ticketPolicy
}

// newState completes a listener's configuration and reports what it can't use.
func newState(l exchange.Listener, refuse func(field, format string, args ...any)) *state {
	if l.TicketLifetime <= 0 {
		l.TicketLifetime = defaultTicketLifetime
	}
	s := &state{Listener: l, settings: newSettings(l.Spec)}
	if s.TLS == nil {
		refuse("spec.certificates", "there is no TLS configuration")
		s.TLS = &tls.Config{}
	}
	s.proxies = prefixes("spec.proxyProtocol.trustedCIDRs", l.Spec.GetProxyProtocol().GetTrustedCidrs(), refuse)
	s.claims = newClaims(l.Spec, refuse)
	return s
}

func prefixes(field string, cidrs []string, refuse func(field, format string, args ...any)) []netip.Prefix {
	var parsed []netip.Prefix
	for i, cidr := range cidrs {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			refuse(fmt.Sprintf("%s[%d]", field, i), "%q is not a CIDR, for example 10.0.0.0/8", cidr)
			continue
		}
		parsed = append(parsed, prefix.Masked())
	}
	return parsed
}

func contains(prefixes []netip.Prefix, address netip.Addr) bool {
	address = address.Unmap()
	for _, prefix := range prefixes {
		if prefix.Contains(address) {
			return true
		}
	}
	return false
}

// socketKey tells sockets apart. Each listener with port 0 has one of its own.
func (s *state) socketKey() string {
	address := s.Spec.GetAddress()
	if strings.HasSuffix(address, ":0") {
		return address + " " + s.Name
	}
	return address
}
