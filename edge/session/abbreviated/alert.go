package abbreviated

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Alerts (RFC 5246 section 7.2).
const (
	alertCloseNotify          tls.AlertError = 0
	alertUnexpectedMessage    tls.AlertError = 10
	alertBadRecordMAC         tls.AlertError = 20
	alertRecordOverflow       tls.AlertError = 22
	alertHandshakeFailure     tls.AlertError = 40
	alertBadCertificate       tls.AlertError = 42
	alertIllegalParameter     tls.AlertError = 47
	alertDecodeError          tls.AlertError = 50
	alertDecryptError         tls.AlertError = 51
	alertProtocolVersion      tls.AlertError = 70
	alertInternalError        tls.AlertError = 80
	alertUserCanceled         tls.AlertError = 90
	alertNoRenegotiation      tls.AlertError = 100
	alertUnsupportedExtension tls.AlertError = 110

	levelWarning = 1
	levelFatal   = 2
)

// alertTime bounds how long the last alert of a connection may wait for the
// socket. The caller's own deadline no longer matters then.
const alertTime = 5 * time.Second

// fail ends the connection with a fatal alert. The error lasts, for reading and
// for writing.
func (c *Conn) fail(alert tls.AlertError, why error) error {
	c.in.err = fmt.Errorf("%w: %w", why, &net.OpError{Op: "local error", Err: alert})
	c.out.failure.CompareAndSwap(nil, &failure{alert, c.in.err})
	c.flushAlerts()
	return c.in.err
}

// failure is a fatal alert that is to be sent, and the error that led to it.
type failure struct {
	alert tls.AlertError
	err   error
}

// flushAlerts sends the alerts that are due. While a Write is under way it is
// left to that: the peer may not read before we do.
func (c *Conn) flushAlerts() {
	for c.out.due() && c.out.mu.TryLock() {
		c.sendDue()
		c.out.mu.Unlock()
	}
}

// sendDue sends what flushAlerts found. out.mu is held.
func (c *Conn) sendDue() {
	out := &c.out
	refusals, failure := out.refusals.Swap(0), out.failure.Load()
	if failure == nil {
		for ; refusals > 0 && out.err == nil && !out.notified; refusals-- {
			out.err = c.writeRecord(recordAlert, []byte{levelWarning, byte(alertNoRenegotiation)})
		}
		return
	}
	if out.failed.Swap(true) || out.err != nil {
		return
	}
	if !out.notified {
		_ = c.conn.SetWriteDeadline(time.Now().Add(alertTime))
		_ = c.writeRecord(recordAlert, []byte{levelFatal, byte(failure.alert)})
	}
	out.err = failure.err
}

// alerted is what an alert of the peer means.
func (c *Conn) alerted(content []byte) error {
	if len(content) != 2 {
		return c.fail(alertDecodeError, errors.New("a malformed alert"))
	}
	alert := tls.AlertError(content[1])
	switch {
	case alert == alertCloseNotify:
		c.in.err = io.EOF
		return io.EOF
	case content[0] == levelWarning:
		return c.countUseless()
	case content[0] == levelFatal:
		c.in.err = &net.OpError{Op: "remote error", Err: alert}
		return c.in.err
	}
	return c.fail(alertIllegalParameter, errors.New("an alert of an unknown level"))
}
