package upgrade

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
)

// Sockets are listening sockets that a process was started with, until it uses them.
// It is safe for concurrent use.
type Sockets struct {
	mu   sync.Mutex
	held []socket
}

type socket struct {
	name    string // of its part
	key     string
	address netip.AddrPort
	file    *os.File
}

// NewSockets holds the sockets of parts. Names are PartListener, found by their key or
// their address, and PartSocket, found by their address alone. It takes their files, also on error.
func NewSockets(parts ...Part) (*Sockets, error) {
	s := &Sockets{}
	var errs []error
	for _, part := range parts {
		address, err := addressOf(part.File)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", part.Name, part.Key, err))
			_ = part.File.Close()
			continue
		}
		s.held = append(s.held, socket{part.Name, part.Key, address, part.File})
	}
	if err := errors.Join(errs...); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// addressOf is where a listening socket of TCP listens.
func addressOf(file *os.File) (netip.AddrPort, error) {
	if file == nil {
		return netip.AddrPort{}, errors.New("there is no socket")
	}
	listener, err := listenerOf(file)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).AddrPort(), nil
}

// listenerOf is a listener of its own on the same socket.
func listenerOf(file *os.File) (*net.TCPListener, error) {
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := listener.(*net.TCPListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("it is a socket of %s, not of TCP", listener.Addr().Network()), listener.Close())
	}
	return tcp, nil
}

// Claim returns the socket for an address as configured, or nil. One of a predecessor
// can be claimed once; one that the process was started with stays, since whoever
// started it keeps the address for it.
func (s *Sockets) Claim(key, address string) (*net.TCPListener, error) {
	if s == nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.find(key, address)
	if at < 0 {
		return nil, nil
	}
	found := s.held[at]
	listener, err := listenerOf(found.file)
	if err != nil {
		return nil, err
	}
	if found.name == PartListener {
		_ = found.file.Close() // the listener has its own
		s.held = append(s.held[:at], s.held[at+1:]...)
	}
	return listener, nil
}

func (s *Sockets) find(key, address string) int {
	for i, held := range s.held {
		if held.name == PartListener && held.key == key {
			return i
		}
	}
	wanted, err := net.ResolveTCPAddr("tcp", address)
	if err != nil || wanted.Port == 0 {
		return -1
	}
	for i, held := range s.held {
		if held.name == PartSocket && sameAddress(held.address, wanted.AddrPort()) {
			return i
		}
	}
	return -1
}

// sameAddress takes all ways to say "all interfaces" for one.
func sameAddress(a, b netip.AddrPort) bool {
	one, other := a.Addr().Unmap(), b.Addr().Unmap()
	wide := func(address netip.Addr) bool { return !address.IsValid() || address.IsUnspecified() }
	return a.Port() == b.Port() && (one == other || wide(one) && wide(other))
}

// Keys are those of sockets of a predecessor that were not claimed.
func (s *Sockets) Keys() []string {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for _, held := range s.held {
		if held.name == PartListener {
			keys = append(keys, held.key)
		}
	}
	return keys
}

// Settle closes the predecessor's sockets that were not claimed.
func (s *Sockets) Settle() { s.drop(PartListener) }

// Close closes all.
func (s *Sockets) Close() { s.drop("") }

func (s *Sockets) drop(name string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var rest []socket
	for _, held := range s.held {
		if name == "" || held.name == name {
			_ = held.file.Close()
		} else {
			rest = append(rest, held)
		}
	}
	s.held = rest
}

// Parts are the sockets that the process was started with, for its successor. Their
// files stay with s.
func (s *Sockets) Parts() []Part {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var parts []Part
	for _, held := range s.held {
		if held.name == PartSocket {
			parts = append(parts, Part{Name: held.name, Key: held.key, File: held.file})
		}
	}
	return parts
}
