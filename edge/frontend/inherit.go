package frontend

import "net"

// A process that takes the place of another gets its listening sockets, so that
// connections that wait in their queues are served, and new ones are never refused.

// Sockets are the listening sockets, by the keys under which Config.Inherited is asked for
// them. They stay the Frontend's, which may close them at any time.
func (f *Frontend) Sockets() map[string]*net.TCPListener {
	f.mu.Lock()
	defer f.mu.Unlock()
	sockets := make(map[string]*net.TCPListener, len(f.sockets))
	for key, socket := range f.sockets {
		sockets[key] = socket.listener
	}
	return sockets
}

func (f *Frontend) inherited(key, address string) (*net.TCPListener, error) {
	if f.cfg.Inherited == nil {
		return nil, nil
	}
	return f.cfg.Inherited(key, address)
}

// Adopt takes over the inherited sockets of these keys that no listener has asked for,
// if one covers their address: they are narrower ones that a wider listener took over
// (overlap.go). It is called before Run.
func (f *Frontend) Adopt(keys []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, key := range keys {
		wide := f.covering(key)
		if wide == nil || f.sockets[key] != nil {
			continue
		}
		listener, err := f.inherited(key, key)
		if err != nil {
			return err
		}
		if listener == nil {
			continue
		}
		adopted := newSocket(listener)
		adopted.owner.Store(wide)
		f.sockets[key] = adopted
	}
	return nil
}

// covering is the slot of a listener for all interfaces that covers an address, or nil.
// f.mu is held.
func (f *Frontend) covering(key string) *slot {
	for other, socket := range f.sockets {
		if overlap(other, key) && isWide(other) {
			return socket.owner.Load()
		}
	}
	return nil
}
