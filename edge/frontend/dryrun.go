package frontend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Usage is what a listener is doing.
type Usage struct {
	// Listener is its configuration.
	Listener exchange.Listener
	// Clients are the connections of clients that it has.
	Clients int
}

// Usage tells of all listeners, by name.
func (f *Frontend) Usage() map[string]Usage {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make(map[string]Usage, len(f.slots))
	for name, slot := range f.slots {
		slot.mu.Lock()
		all[name] = Usage{Listener: slot.state.Load().Listener, Clients: len(slot.conns)}
		slot.mu.Unlock()
	}
	return all
}

// Try finds out what Prepare would refuse, without disturbing what is served:
// addresses that are not bound are bound for a moment, but nothing listens on them. An
// address that overlaps with one that is served is not tried, since that takes a
// change to the sockets in use.
func (f *Frontend) Try(listeners []exchange.Listener) []*resealv1.Violation {
	var violations []*resealv1.Violation
	ports := map[string][]*state{}
	for _, listener := range listeners {
		refuse := func(field, format string, args ...any) {
			violations = append(violations, &resealv1.Violation{
				Resource: &resealv1.ResourceRef{Kind: "Listener", Name: listener.Name},
				Field:    field, Description: fmt.Sprintf(format, args...),
			})
		}
		next := newState(listener, refuse)
		key := next.socketKey()
		port := keyPort(key)
		if other := rival(next, ports[port]); other != nil {
			refuse("spec.address", "address already in use by Listener/%s", other.Name)
		} else if f.socket(key) == nil && !f.overlaps(key) {
			if err := tryBind(next.Spec.GetAddress()); err != nil {
				refuse("spec.address", "%s", bindProblem(err))
			}
		}
		ports[port] = append(ports[port], next)
	}
	return violations
}

// errBound ends a Listen whose socket was bound and is not to listen.
var errBound = errors.New("bound")

// tryBind binds a socket as listen makes it, and closes it again. It does not listen,
// so no client finds it, and whoever listens there already keeps the address.
func tryBind(address string) error {
	config := net.ListenConfig{Control: func(network, address string, conn syscall.RawConn) error {
		to, err := socketAddress(network, address)
		if err != nil {
			return err
		}
		var bound error
		if err := conn.Control(func(fd uintptr) { bound = syscall.Bind(int(fd), to) }); err != nil {
			return err
		}
		if bound != nil {
			return bound
		}
		return errBound
	}}
	listener, err := config.Listen(context.Background(), "tcp", address)
	if err == nil {
		return listener.Close()
	}
	if errors.Is(err, errBound) {
		return nil
	}
	return err
}

// socketAddress is the address of a socket of a network, "tcp4" or "tcp6".
func socketAddress(network, address string) (syscall.Sockaddr, error) {
	resolved, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, err
	}
	at, _ := netip.AddrFromSlice(resolved.IP) // the zero Addr for all interfaces
	if network == "tcp4" {
		to := &syscall.SockaddrInet4{Port: resolved.Port}
		if at.IsValid() {
			to.Addr = at.Unmap().As4()
		}
		return to, nil
	}
	to := &syscall.SockaddrInet6{Port: resolved.Port}
	if at.IsValid() && !at.Unmap().IsUnspecified() {
		to.Addr = at.As16()
	}
	if resolved.Zone != "" {
		iface, err := net.InterfaceByName(resolved.Zone)
		if err != nil {
			return nil, err
		}
		to.ZoneId = uint32(iface.Index)
	}
	return to, nil
}
