package peers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/reseal/reseal/integration/process"
)

// OpenSSL starts `openssl s_server -WWW`. It serves one connection at a time,
// answers with HTTP/1.0 and closes, so the end of a body is the end of the
// connection. It supports only GET. Counts come from its -state lines.
func OpenSSL(ctx context.Context, o Options) (*Backend, error) {
	if o.HTTP2 {
		return nil, fmt.Errorf("openssl: h2: %w", ErrMode)
	}
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	certificate, key, _, err := pair.Write(o.Dir, "openssl")
	if err != nil {
		return nil, err
	}
	for _, path := range []string{Empty, Small, Large} {
		if _, err := writeFile(o.Dir, filepath.Join("www", path), Body(path)); err != nil {
			return nil, err
		}
	}
	address := o.Address
	if address == "" {
		address = "127.0.0.1:0"
	}
	args := []string{
		"s_server", "-accept", address, "-cert", certificate, "-key", key, "-WWW", "-state",
		pick(o.Mode == TLS13, "-tls1_3", "-tls1_2"),
	}
	if o.NoSessions {
		args = append(args, "-no_ticket", "-no_cache", "-num_tickets", "0")
	} else if o.Mode == TLS12SessionIDs {
		args = append(args, "-no_ticket")
	}
	counter := &opensslCounter{fixed: address}
	openssl, err := process.Start(process.Config{
		Name: "s_server", Path: "openssl", Args: args, Dir: filepath.Join(o.Dir, "www"), OnLine: counter.line,
	})
	if err != nil {
		return nil, err
	}
	if err := started(openssl, openssl.WaitReady(ctx, func(context.Context) error {
		if counter.address.Load() == nil {
			return errors.New("no ACCEPT line yet")
		}
		return nil
	})); err != nil {
		return nil, err
	}
	return &Backend{
		Name: "openssl-" + o.Mode.String(), Address: *counter.address.Load(), Mode: o.Mode,
		paths: has(Empty, Small, Large), output: openssl.Output, stop: openssl.Stop, running: openssl,
		counts: func(context.Context) (Counts, error) { return counter.counts(o.Mode), nil },
	}, nil
}

// opensslCounter follows the states of the one connection that s_server has.
type opensslCounter struct {
	// address is set when it listens; fixed is what it was told to.
	address atomic.Pointer[string]
	fixed   string

	mu      sync.Mutex
	total   Counts
	resumed int64
	// Of the current connection.
	begun, certified, readFinished, wroteFinished, done, notified, closing bool
}

func (c *opensslCounter) line(line string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case line == "ACCEPT":
		c.address.Store(&c.fixed)
		return true
	case strings.HasPrefix(line, "ACCEPT "):
		address := strings.TrimPrefix(line, "ACCEPT ")
		c.address.Store(&address)
		return true
	case line == "SSL_accept:before SSL initialization":
		// Printed twice per handshake.
		if !c.begun || c.wroteFinished || c.readFinished || c.certified {
			c.end()
			c.begun = true
			c.total.Connections++
		}
	case line == "SSL_accept:SSLv3/TLS write certificate":
		c.certified = true
	case line == "SSL_accept:SSLv3/TLS write finished":
		c.wroteFinished = true
	case line == "SSL_accept:SSLv3/TLS read finished":
		c.readFinished = true
	case strings.HasPrefix(line, "FILE:"):
		c.total.Requests++
	case line == "SSL3 alert read:warning:close notify":
		c.notified = true
	case line == "SSL3 alert write:warning:close notify":
		c.closing = true
	default:
		return !strings.HasPrefix(line, "SSL_accept:")
	}
	if c.readFinished && c.wroteFinished && !c.done {
		c.done = true
		if c.certified {
			c.total.Full++
		} else {
			c.resumed++
		}
	}
	return false
}

// end closes the books of the connection before.
func (c *opensslCounter) end() {
	if c.begun && !c.done {
		c.total.Failed++
	}
	if c.done && !c.notified && !c.closing {
		c.total.Unclean++
	}
	c.begun, c.certified, c.readFinished, c.wroteFinished = false, false, false, false
	c.done, c.notified, c.closing = false, false, false
}

func (c *opensslCounter) counts(mode Mode) Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	counts := c.total
	counts.setResumed(mode, c.resumed)
	counts.Resets = Unknown
	return counts
}
