package http2

// A frame that costs us work and brings nobody anything takes one from a peer's
// credit: resets of streams that have just begun, by the peer (CVE-2023-44487) or
// by us for a fault of the peer's (CVE-2025-8671), CONTINUATION, PING, SETTINGS,
// PRIORITY, window updates, empty DATA, frames on streams that are closed, and
// frames of unknown types. A peer without credit is told ENHANCE_YOUR_CALM.
//
// Exchanges that end in order earn credit, and so does each DATA frame that we
// send: peers answer it with window updates for stream and connection, and some
// (gRPC) with a PING. Window updates that give back what we have sent, a KB or
// more at once, cost nothing. Ordinary peers earn more than they use. Nothing is
// earned by DATA that is small for want of a window (CVE-2019-9511).

const (
	// dataCredit is earned by each DATA frame that is sent.
	dataCredit = 3
	// fairReturn is the smallest window update that costs nothing.
	fairReturn = 1024
)

// errFlood is the reason of a connection that ends for want of credit.
const errFlood = "too many frames that are of no use to anybody (RFC 9113 section 10.5)"

// Refill adds to the peer's credit; the caller does so as time passes, like 100
// for a second. Streams that began before are no longer young: their resets are
// free, since the ends of time limits, on either side, are not a flood.
func (c *Conn) Refill(n int) {
	c.epoch++
	c.earn(n)
}

func (c *Conn) earn(n int) { c.credit = min(c.credit+n, c.cfg.FloodCredit) }

// Flooded reports whether the connection has ended because the peer flooded it.
func (c *Conn) Flooded() bool { return c.failed != nil && c.failed.Reason == errFlood }

// payReturn pays for a window update, unless it gives back what was sent: once
// for the stream, and once for the connection.
func (c *Conn) payReturn(n int) error {
	if n >= fairReturn && n <= c.returnable {
		c.returnable -= n
		return nil
	}
	return c.pay()
}

func (c *Conn) pay() error {
	if c.credit--; c.credit >= 0 {
		return nil
	}
	return c.fail(EnhanceYourCalm, errFlood)
}
