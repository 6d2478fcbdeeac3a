package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
)

// dialLog remembers why each address could not be used, since gRPC says so only
// of the last one.
type dialLog struct {
	addresses []string

	mu       sync.Mutex
	problems map[string]*dialProblem // by address
	reached  bool                    // one address got through its handshake
}

// dialProblem is why an address could not be used.
type dialProblem struct {
	text string
	tls  bool // something listens there
}

func newDialLog(addresses []string) *dialLog {
	return &dialLog{addresses: addresses, problems: make(map[string]*dialProblem)}
}

// loggedConn carries the address that was dialled.
type loggedConn struct {
	net.Conn
	address string
}

func (l *dialLog) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		l.note(address, &dialProblem{text: dialText(err)})
		return nil, err
	}
	return &loggedConn{Conn: conn, address: address}, nil
}

// note remembers the newest result for an address. A nil problem is success.
func (l *dialLog) note(address string, problem *dialProblem) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reached = l.reached || problem == nil
	l.problems[address] = problem
}

// unreachable is the error of a control plane to which no connection could be
// made, or nil when there was one.
func (l *dialLog) unreachable(t *target) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reached {
		return nil
	}
	parts := make([]string, 0, len(l.addresses))
	hint := "Is it running?"
	for _, address := range l.addresses {
		text := "no answer"
		if problem := l.problems[address]; problem != nil {
			text = problem.text
			if problem.tls {
				hint = "Is this the right context for it?"
			}
		}
		parts = append(parts, address+": "+text)
	}
	where := "(" + t.String() + ")"
	if t.name != "" {
		where = fmt.Sprintf("(context %q of %s)", t.name, t.path)
	}
	return fmt.Errorf("can't reach the control plane at %s. %s %s", strings.Join(parts, "; "), hint, where)
}

func dialText(err error) string {
	var (
		errno syscall.Errno
		dns   *net.DNSError
	)
	switch {
	case errors.As(err, &dns):
		return fmt.Sprintf("%s: %s", dns.Name, dns.Err)
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), os.IsTimeout(err):
		return "no answer"
	}
	return err.Error()
}

func handshakeProblem(err error) *dialProblem {
	if err == nil {
		return nil
	}
	var unknown x509.UnknownAuthorityError
	text := strings.TrimPrefix(err.Error(), "tls: failed to verify certificate: ")
	switch {
	case errors.As(err, &unknown):
		text = "its certificate is not signed by the context's roots"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		text = "it ended the TLS handshake"
	case errors.Is(err, context.DeadlineExceeded), os.IsTimeout(err):
		text = "no answer to the TLS handshake"
	}
	return &dialProblem{text: text, tls: true}
}
