package frontend

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestCrew does jobs at once, however many there are, by goroutines that stay for
// the next, leave after a while, and at once when all is over.
func TestCrew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var work sync.WaitGroup
		c := newCrew(&work)
		done := make(chan int, 100)
		hold := make(chan struct{})
		for i := range 100 {
			c.do(func() {
				<-hold
				done <- i
			})
		}
		synctest.Wait()
		close(hold)
		for range 100 {
			<-done
		}
		synctest.Wait()
		select {
		case c.jobs <- func() { done <- 0 }:
		default:
			t.Fatal("nobody has stayed for the next job")
		}
		<-done
		time.Sleep(crewStay + time.Millisecond)
		work.Wait()
		c.do(func() { done <- 0 })
		<-done
		close(c.over)
		begin := time.Now()
		work.Wait()
		if d := time.Since(begin); d > 0 {
			t.Errorf("the last one stayed %v", d)
		}
	})
}
