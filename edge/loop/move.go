package loop

import "slices"

// move sends connections to other loops.
func (l *Loop) move() {
	for i, c := range l.moving {
		l.moving[i] = nil
		if c.phase == finished {
			c.moving.population.Add(-1)
			continue // its heir knows
		}
		c.depart()
	}
	l.moving = l.moving[:0]
}

// depart takes the connection off its loop. From Post on it is another's.
func (c *Conn) depart() {
	l, to := c.loop, c.moving
	c.source.detach()
	l.output -= c.counted
	c.counted = 0
	if c.queued {
		l.ready = slices.DeleteFunc(l.ready, func(other *Conn) bool { return other == c })
	}
	if c.dirty {
		l.dirty = slices.DeleteFunc(l.dirty, func(other *Conn) bool { return other == c })
	}
	c.queued, c.dirty = false, false
	l.disown(c)
	c.stopTimers()
	if c.linger != nil {
		c.linger.Stop()
	}
	c.loop, c.linger = nil, nil
	if to.Post(func() {
		c.handler, c.heir, c.moving = c.heir, nil, nil
		to.receive(c)
	}) {
		return
	}
	to.population.Add(-1)
	c.phase = finished
	c.source.close(false)
	heir := c.heir
	c.ending.Err = ErrStopped
	l.protect(nil, func() { heir.Closed(c, c.ending) })
}
