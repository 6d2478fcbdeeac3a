package upgrade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
)

// Estate is what a predecessor has to hand over. Its functions are called in the order
// in which they stand, by one goroutine.
type Estate struct {
	// Terms are told first. Protocol and PID are filled in.
	Terms Terms
	// Offer returns what a successor needs to get ready. The files stay the caller's.
	Offer func() ([]Part, error)
	// Last returns what it needs to serve, as of now: it is ready.
	Last func() []Part
	// Yield is called when the successor serves. It returns when this process no longer
	// writes its state, nor speaks with the control plane, nor accepts connections.
	Yield func() []Part
}

// Parting is a predecessor that drains. It tells its successor how far it is.
type Parting struct{ channel *channel }

// HandOver hands over to the process at the other end of conn. Until it calls
// Estate.Yield nothing has changed for this process, and any error means that the
// other one must be ended (Child.End); afterwards it returns no error, whatever
// becomes of the other. conn is the Parting's then; on error it is closed.
func HandOver(ctx context.Context, conn *net.UnixConn, estate Estate) (*Parting, error) {
	c := &channel{conn: conn}
	if err := handOver(ctx, c, estate); err != nil {
		return nil, errors.Join(err, c.close())
	}
	parts := estate.Yield()
	done := c.within(context.WithoutCancel(ctx), stepTime)
	defer done()
	if c.hand(parts) == nil { // or else it has ended, and nobody can help that
		_ = c.say(kindYours, nil)
	}
	return &Parting{c}, nil
}

// handOver is HandOver until the successor serves.
func handOver(ctx context.Context, c *channel, estate Estate) error {
	if err := c.welcome(ctx, estate.Terms); err != nil {
		return err
	}
	parts, err := estate.Offer()
	if err != nil {
		return err
	}
	if err := c.step(ctx, parts, kindOffered); err != nil {
		return err
	}
	done := c.within(ctx, startTime)
	defer done()
	if err := c.await(ctx, kindReady); err != nil {
		return err
	}
	if err := c.step(ctx, estate.Last(), kindGo); err != nil {
		return err
	}
	done = c.within(ctx, stepTime)
	defer done()
	return c.await(ctx, kindServing)
}

// welcome takes the hello and answers it.
func (c *channel) welcome(ctx context.Context, terms Terms) error {
	done := c.within(ctx, startTime)
	defer done()
	m, err := c.receive()
	if err != nil {
		return explain(ctx, err, "it said nothing")
	}
	var h hello
	if err := json.Unmarshal(m.Body, &h); err != nil || m.Kind != kindHello {
		return fmt.Errorf("%w: %q in place of hello", ErrProtocol, m.Kind)
	}
	terms.Protocol, terms.PID = agree(h), os.Getpid()
	if terms.Protocol == 0 {
		why := fmt.Sprintf("version %s hands over by the protocols %d to %d, version %s by %d to %d: there is none in common, so stop the edge and start the new version",
			terms.Version, oldest, newest, h.Version, h.Oldest, h.Newest)
		_ = c.say(kindRefused, reason{why}) // it ends in any case
		return errors.New(why)
	}
	return c.say(kindWelcome, terms)
}

// step hands parts over and says what they were.
func (c *channel) step(ctx context.Context, parts []Part, k kind) error {
	done := c.within(ctx, stepTime)
	defer done()
	err := c.hand(parts)
	if err == nil {
		err = c.say(k, nil)
	}
	return explain(ctx, err, "it takes nothing")
}

// await waits until the successor says k.
func (c *channel) await(ctx context.Context, k kind) error {
	m, err := c.receive()
	switch {
	case err != nil:
		return explain(ctx, err, fmt.Sprintf("it did not say %q in time", k))
	case m.Kind == k:
		return nil
	case m.Kind == kindFailed:
		var why reason
		_ = json.Unmarshal(m.Body, &why) // says nothing then
		return fmt.Errorf("it failed: %s", why.Reason)
	}
	return fmt.Errorf("%w: %q in place of %q", ErrProtocol, m.Kind, k)
}

// explain says what passed when a deadline did.
func explain(ctx context.Context, err error, late string) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New(late)
	}
	return err
}

// Tell says how far this process is. It waits for nothing for long.
func (p *Parting) Tell(progress Progress, parts ...Part) {
	done := p.channel.within(context.Background(), stepTime)
	defer done()
	if p.channel.hand(parts) == nil {
		_ = p.channel.say(kindProgress, progress) // nobody listens, so be it
	}
}

// End says that this process ends, and closes the channel.
func (p *Parting) End(parts ...Part) {
	done := p.channel.within(context.Background(), stepTime)
	if p.channel.hand(parts) == nil {
		_ = p.channel.say(kindEnded, nil) // likewise
	}
	done()
	_ = p.channel.close()
}
