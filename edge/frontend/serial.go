package frontend

import "time"

// serial is what drivers have in common that serve one request at a time.
type serial struct {
	client  *clientConn
	request *request // under way, or nil
	held    int      // bytes of the body that the backend's leg has not got rid of
	unsaid  int      // bytes of the answer that the client has not taken
}

// wrote notes that n bytes of the answer were written, and whether more were welcome.
func (s *serial) wrote(n int, welcome bool) {
	if !welcome || s.unsaid > 0 {
		s.unsaid += n
	} else {
		s.request.taken(n)
	}
}

// writable implements driver.
func (s *serial) writable() {
	if n := s.unsaid; n > 0 && s.request != nil {
		s.unsaid = 0
		s.request.taken(n)
	}
}

// lookAt ends the request under way when it takes too long: see request.look.
func (s *serial) lookAt(now time.Duration) time.Duration {
	if s.client.moved == now && s.request.untaken > 0 {
		s.request.took = now // the client takes something, if slowly
	}
	return s.request.look(now)
}

// lost ends the request of a client that has left.
func (s *serial) lost(err error) {
	s.closed(err)
	s.client.conn.Abort()
}

// closed implements driver.
func (s *serial) closed(err error) {
	if q := s.request; q != nil {
		s.request = nil
		q.gone(err)
	}
}
